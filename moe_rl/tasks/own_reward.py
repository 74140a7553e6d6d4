"""Your own reward: a function with the signature of TRL's reward functions.

moe-rl train --task dataset --dataset rows.jsonl --reward my_reward.py:my_reward

It is called with prompts, completions, completion_ids and the columns of the rows as they are, all
as keyword arguments and lists of one entry a completion, and returns a number for each completion.
Where prompts are lists of messages, completions are lists of one message.
"""

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

from moe_rl.runtime.own_code import OwnFunction, load_function
from moe_rl.runtime.strict import ConfigError
from moe_rl.tasks.base import Prompt

_OURS = ("prompts", "completions", "completion_ids")


def load_reward(name: str, sha256: str | None, columns: Iterable[str]) -> OwnFunction:
    """The function FILE.py:FUNCTION or MODULE:FUNCTION.

    Args:
        name: of the function.
        sha256: that its file must have; None: not checked.
        columns: of the rows, which it is called with.

    Raises:
        ConfigError: see `load_function`; or it cannot be called as TRL calls reward functions.
    """
    own = load_function("reward", name, sha256)
    with own.errors():
        signature = inspect.signature(own.function)
    try:
        signature.bind(**dict.fromkeys([*_OURS, *columns]))
    except TypeError as error:
        raise ConfigError(
            f"reward={name!r}: its arguments are {signature}, {error}; take those it reads by name "
            "and the rest as **kwargs, as in TRL"
        ) from error
    if inspect.iscoroutinefunction(own.function):
        raise ConfigError(f"reward={name!r}: a coroutine, which is not awaited here; use def")
    return own


def call_reward(
    own: OwnFunction, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Any
) -> list[Any]:
    """What the function returns for each completion.

    Raises:
        ConfigError: whatever goes wrong within it, with the line of its file.
    """
    answers = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, completions, strict=True)
    ]
    with own.errors():
        given = [prompt if isinstance(prompt, str) else [*prompt] for prompt in prompts]
        return [*own.function(prompts=given, completions=answers, **columns)]
