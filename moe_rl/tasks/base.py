"""What a task is: prompts with a verifiable answer, noisy demonstrations, and a reward.

One token is one entry of `alphabet`, mostly a character; the trainer appends the end of sequence.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

Message = Mapping[str, Any]
"""One message of a conversation: {"role": "user", "content": text}."""
Prompt = str | Sequence[Message]
"""A text, or messages that the chat template of the model's tokenizer writes out."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A prompt, and the values its reward needs."""

    prompt: Prompt
    columns: Mapping[str, Any]
    """Keyword arguments of `Task.reward`, as lists of one entry per completion."""


class Listed(NamedTuple):
    """A problem with its place, such as file and line number, and a completion with reward 1."""

    where: str
    problem: Problem
    answer: str | None
    """None: no completion is known to be right."""


_EXAMPLES = 64  # problems that a task without a list shows when a tokenizer is checked


class Task(ABC):
    """A seeded, offline task with a verifiable reward.

    Every draw comes from the generator passed in: equal generators give equal problems, and
    `prompts` and `demonstrations` of equal generators are about the same problems.
    """

    name: ClassVar[str]

    @property
    @abstractmethod
    def alphabet(self) -> Sequence[str]:
        """Tokens of prompts and completions, each once: a string of characters, or longer ones."""

    @property
    @abstractmethod
    def max_prompt_tokens(self) -> int:
        """Tokens of the longest prompt."""

    @property
    @abstractmethod
    def max_response_tokens(self) -> int:
        """Tokens of the longest completion that can be right, end of sequence included."""

    def listed(self) -> Sequence[Listed]:
        """All problems of a task that reads them, held-out ones included, or examples of them."""
        rng = np.random.default_rng(0)
        pairs = self.demonstrations(rng, _EXAMPLES, 0.0)
        problems = self.prompts(np.random.default_rng(0), _EXAMPLES)
        return [
            Listed(f"task {self.name}", problem, answer)
            for problem, (_, answer) in zip(problems, pairs, strict=True)
        ]

    def held_out(self) -> Sequence[Problem]:
        """Problems that are evaluated and never trained on; empty for a task that draws them."""
        return ()

    @abstractmethod
    def prompts(self, rng: np.random.Generator, count: int) -> list[Problem]:
        """`count` problems, drawn with replacement."""

    @abstractmethod
    def demonstrations(
        self, rng: np.random.Generator, count: int, slip: float
    ) -> list[tuple[Prompt, str]]:
        """`count` pairs (prompt, completion) by an imperfect solver.

        At each step the solver slips with probability `slip` (0 to 1) and continues from there.
        """

    @abstractmethod
    def reward(
        self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]
    ) -> list[float]:
        """1.0 for a right completion, less for any other, whatever its text.

        The signature is that of TRL's reward functions; `columns` holds the problems' columns, one
        entry per completion, and may hold others.

        Raises:
            KeyError: a column of the problems is missing.
            ValueError: a column has another length than `completions`.
        """


def check_range(name: str, value: int, low: int, high: int, why: str) -> None:
    """Raise ValueError unless `value` is from `low` to `high`."""
    if not low <= value <= high:
        raise ValueError(f"{name}={value}: give an integer from {low} to {high}; {why}")
