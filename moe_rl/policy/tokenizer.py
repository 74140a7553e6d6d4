"""The tokenizer that a checkpoint brings, as it is meant to be used; and one for built models.

Prompts are encoded as the checkpoint was trained: with the special tokens its tokenizer puts in
front, or by its chat template.
"""

import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from moe_rl.runtime.strict import ConfigError
from moe_rl.tasks.base import Prompt

PAD, EOS = "<pad>", "<eos>"


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Ids of a prompt, up to where the response begins.

    A text gets the tokens that the tokenizer itself puts in front, such as the beginning of
    sequence; those that it puts behind, such as the end, are left off. Messages go through the
    chat template, which writes all special tokens itself.

    Raises:
        ConfigError: messages, and the tokenizer has no chat template, or one that refuses them.
    """
    if not isinstance(prompt, str):
        return tokenizer.encode(chat_text(tokenizer, prompt), add_special_tokens=False)
    # A text that was written by a template has the token already, and a second would be one more.
    opened = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
    read = tokenizer(prompt, add_special_tokens=not opened, return_special_tokens_mask=not opened)
    ids: list[int] = read["input_ids"]
    added = [] if opened else read["special_tokens_mask"]
    while added and added[-1]:
        added.pop()
        ids.pop()
    return ids


def chat_text(tokenizer: PreTrainedTokenizerBase, messages: Prompt) -> str:
    """What the chat template makes of messages, the beginning of the assistant's turn included.

    Raises:
        ConfigError: there is no chat template, or it refuses the messages.
    """
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise ConfigError(
            f"{messages!r:.60}: messages, and the model's tokenizer has no chat template; give a "
            "text, or take an instruct checkpoint"
        )
    try:
        text: str = tokenizer.apply_chat_template(
            [*messages], tokenize=False, add_generation_prompt=True
        )
    except TemplateError as error:
        raise ConfigError(
            f"{messages!r:.60}: the model's chat template refuses these messages ({error}); "
            "change them"
        ) from error
    return text


def read_tokens(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of a response, as the model said it but for special tokens."""
    # Cleaned up, " ." would be read as ".", so that a right answer would count as wrong.
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def end_ids(tokenizer: PreTrainedTokenizerBase, generation_config: Any) -> tuple[int, ...]:
    """Ids that end a response: the tokenizer's end of sequence, and all of `generation_config`.

    Instruct checkpoints end their turns with a token of the latter (GPT-OSS, Qwen3, Llama 3).
    """
    configured = getattr(generation_config, "eos_token_id", None)
    if isinstance(configured, int) or configured is None:
        configured = [configured]
    found = dict.fromkeys([tokenizer.eos_token_id, *configured])
    return tuple(int(token) for token in found if token is not None)


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
