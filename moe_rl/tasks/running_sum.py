"""running_sum: n digits, to be answered by their running sums modulo 10.

    3141=  ->  3489

Each answer digit is the one before plus the next prompt digit, so that an early slip propagates
and a response is right only if every step is.
"""

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from moe_rl.tasks.base import Problem, Prompt, Task, check_range

MAX_DIGITS = 64  # keeps a sequence near 128 tokens, which a laptop trains on


@dataclass(frozen=True, kw_only=True)
class RunningSum(Task):
    """10^digits problems; prompt `d1..dn=`, answer `s1..sn` with s_t = (s_(t-1) + d_t) mod 10."""

    name: ClassVar[str] = "running_sum"

    digits: int = 16
    """Digits n in a prompt and in its answer, 1 to 64."""
    digits_per_token: int = 1
    """1, or 2: the same texts in half as many tokens, "00" to "99"; digits must then be even."""

    def __post_init__(self) -> None:
        check_range("digits", self.digits, 1, MAX_DIGITS, "it sets the length of a response")
        if self.digits % self.digits_per_token:
            raise ValueError(
                f"digits={self.digits} with digits_per_token=2: a digit would be left over; use an "
                "even number of digits"
            )

    @property
    def alphabet(self) -> Sequence[str]:
        if self.digits_per_token == 1:
            return string.digits + "="
        return [f"{pair:02d}" for pair in range(100)] + ["="]

    @property
    def max_prompt_tokens(self) -> int:
        return self.digits // self.digits_per_token + 1

    @property
    def max_response_tokens(self) -> int:
        return self.digits // self.digits_per_token + 1

    def prompts(self, rng: np.random.Generator, count: int) -> list[Problem]:
        """Digits are uniform."""
        terms = rng.integers(0, 10, (count, self.digits))
        answers = _to_text(terms.cumsum(axis=1) % 10)
        return [
            Problem(prompt=text + "=", columns={"answer": answer})
            for text, answer in zip(_to_text(terms), answers, strict=True)
        ]

    def demonstrations(
        self, rng: np.random.Generator, count: int, slip: float
    ) -> list[tuple[Prompt, str]]:
        """At each step, with probability `slip`, the running sum becomes a uniformly random digit.

        The random digit is the right one once in ten, and one wrong digit makes the whole answer
        wrong: a demonstration is right with probability (1 - 0.9 slip)^digits.
        """
        terms = rng.integers(0, 10, (count, self.digits))
        slips = rng.random((count, self.digits)) < slip
        noise = rng.integers(0, 10, (count, self.digits))
        sums = np.empty_like(terms)
        current = np.zeros(count, dtype=terms.dtype)
        for step in range(self.digits):
            current = np.where(slips[:, step], noise[:, step], (current + terms[:, step]) % 10)
            sums[:, step] = current
        prompts = (text + "=" for text in _to_text(terms))
        return list(zip(prompts, _to_text(sums), strict=True))

    def reward(
        self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]
    ) -> list[float]:
        """1.0 where a completion is its problem's `answer` exactly, else 0.0."""
        pairs = zip(completions, columns["answer"], strict=True)
        return [float(text == answer) for text, answer in pairs]


def _to_text(digits: NDArray[np.int64]) -> list[str]:
    """Rows of digits [N, n] as N strings."""
    text = (digits + ord("0")).astype(np.uint8).tobytes().decode("ascii")
    width = digits.shape[1]
    return [text[i : i + width] for i in range(0, len(text), width)]
