"""What a task is: prompts with a verifiable answer, noisy demonstrations, and a reward.

One token is one character; the end-of-sequence token is appended by the trainer, not by the task.
"""

from __future__ import annotations

import string
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A prompt and what the reward needs to know of it."""

    prompt: str
    """Text the policy sees."""

    columns: Mapping[str, Any]
    """Values that `Task.reward` takes as keyword lists, one entry a completion."""


@dataclass(frozen=True, kw_only=True)
class Listed:
    """A problem that stands in a file."""

    where: str
    """File and line."""
    prompt: str
    answer: str
    """A completion that is right."""


class Task(ABC):
    """A seeded, offline task with a verifiable reward.

    Every draw comes from the generator passed in: equal generators give equal problems, and
    `prompts` and `demonstrations` of equal generators are about the same problems.
    """

    name: ClassVar[str]
    """The name by which `make_task` finds the task."""

    @property
    @abstractmethod
    def alphabet(self) -> str:
        """Characters of prompts and completions, each once."""

    @property
    @abstractmethod
    def max_prompt_tokens(self) -> int:
        """Tokens of the longest prompt."""

    @property
    @abstractmethod
    def max_response_tokens(self) -> int:
        """Tokens of the longest completion that can be right, end of sequence included."""

    def listed(self) -> Sequence[Listed]:
        """Every problem of a task that reads them from a file; none where they are drawn."""
        return ()

    @abstractmethod
    def prompts(self, rng: np.random.Generator, count: int) -> list[Problem]:
        """`count` problems, drawn with replacement."""

    @abstractmethod
    def demonstrations(
        self, rng: np.random.Generator, count: int, slip: float
    ) -> list[tuple[str, str]]:
        """`count` pairs (prompt, completion) by an imperfect solver.

        At each step the solver slips with probability `slip` (0 to 1) and goes on from the slip.
        """

    @abstractmethod
    def reward(
        self, prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]
    ) -> list[float]:
        """1.0 for a right completion, 0.0 for any other, whatever its text.

        The signature is that of TRL's reward functions; `columns` holds the problems' columns, one
        entry a completion, and may hold others.

        Raises:
            ValueError: a column missing or of another length than completions.
        """


def column(
    columns: Mapping[str, Sequence[Any]], name: str, completions: Sequence[str]
) -> Sequence[Any]:
    """The column `name`, as long as `completions`, or a ValueError."""
    if name not in columns:
        raise ValueError(
            f"reward needs the column {name!r}, one entry a completion; got "
            f"{sorted(columns) or 'none'}: pass the columns of the problems"
        )
    values = columns[name]
    if len(values) != len(completions):
        raise ValueError(
            f"{name} has {len(values)} entries for {len(completions)} completions: repeat a "
            "problem's columns once a sample"
        )
    return values


def check_draw(count: int, slip: float = 0.0) -> None:
    """Raise ValueError unless count >= 0 and 0 <= slip <= 1."""
    if count < 0:
        raise ValueError(f"count is {count}; expected at least 0")
    if not 0.0 <= slip <= 1.0:
        raise ValueError(f"slip is {slip}; expected a probability, from 0 to 1")


def check_option(name: str, value: int, low: int, high: int, why: str) -> None:
    """Raise ValueError unless `value` is an integer from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}; expected an integer from {low} to {high}: {why}")


DIGITS = string.digits
