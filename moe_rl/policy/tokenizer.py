"""A tokenizer in Hugging Face form for models built from a config: mostly a token a character."""

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

PAD, EOS = "<pad>", "<eos>"


def tokenizer_of(pieces: Sequence[str]) -> PreTrainedTokenizerFast:
    """Ids: 0 padding, 1 end of sequence, from 2 on `pieces`, sorted: characters or longer strings.

    A text is read from its start, the longest piece that fits first.

    The result saves and loads like any tokenizer of transformers, so a policy trained here is an
    ordinary checkpoint folder.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {PAD: 0, EOS: 1, **{c: i + 2 for i, c in enumerate(sorted(set(pieces)))}}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=PAD))
    longer = [re.escape(p) for p in sorted(pieces, key=len, reverse=True) if len(p) > 1]
    # Not `.`, which does not match newlines: two of them would be one unknown piece.
    pattern = Regex("|".join([*longer, r"[\s\S]"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        # With it " ." is decoded as ".", so that a right answer would count as wrong.
        clean_up_tokenization_spaces=False,
    )
