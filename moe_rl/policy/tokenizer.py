"""A character-level tokenizer in Hugging Face form, for models built from a config."""

from transformers import PreTrainedTokenizerFast

PAD, EOS = "<pad>", "<eos>"


def character_tokenizer(alphabet: str) -> PreTrainedTokenizerFast:
    """Ids: 0 padding, 1 end of sequence, from 2 on the characters of `alphabet`, sorted.

    The result saves and loads like any tokenizer of transformers, so a policy trained here is an
    ordinary checkpoint folder.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {PAD: 0, EOS: 1, **{c: i + 2 for i, c in enumerate(sorted(set(alphabet)))}}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=PAD))
    # Not `.`, which does not match newlines: two of them would be one unknown piece.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        # With it " ." is decoded as ".", so that a right answer would count as wrong.
        clean_up_tokenization_spaces=False,
    )
