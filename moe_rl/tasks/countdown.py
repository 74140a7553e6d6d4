"""countdown: combine all the numbers, two at a time, until the target is left.

    13,25,14=02:  ->  25-13=12,14-12=2

Each step takes two of the values at hand and puts their sum, difference or product back. With three
numbers 7.6 first steps are possible on average, of which 1.8 leave the target within reach.

This is the countdown task of TinyZero (github.com/Jiayi-Pan/TinyZero) without division, and with
the steps in place of one expression: a small model writes its intermediate results down.
"""

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import combinations
from typing import Any, ClassVar

import numpy as np

from moe_rl.tasks.base import Problem, Prompt, Task, check_range

MAX_NUMBERS = 4  # a fifth would make the search behind every prompt about 30 times as long

Pool = tuple[int, ...]  # the values at hand, descending


@dataclass(frozen=True, kw_only=True)
class Countdown(Task):
    """Prompt `n1,n2,n3=target:` at fixed width; answer the steps `a+b=c`, comma-separated.

    There are 36,109 prompts with the defaults, 120,114 with max_number 25, 312,925 with 4 numbers
    up to 9, but only 1,485 with 2 numbers up to 25: few enough to be memorised.

    A completion is right if every step combines two values at hand by +, - or * into one from 1
    to `max_value`, all numbers are used once, and the last value is the target. Numbers in
    completions have no leading zeros, so that responses differ in length.
    """

    name: ClassVar[str] = "countdown"

    numbers: int = 3
    """Numbers to combine, 2 to 4."""

    max_number: int = 15
    """Numbers are drawn uniformly from 1 to this, 2 to 99."""

    max_value: int = 99
    """Largest target and largest result of a step; from max(numbers, max_number) to 999."""

    def __post_init__(self) -> None:
        check_range("numbers", self.numbers, 2, MAX_NUMBERS, "the search grows with each")
        check_range("max_number", self.max_number, 2, 99, "numbers are drawn from 1 to it")
        least = max(self.numbers, self.max_number)
        check_range("max_value", self.max_value, least, 999, "the sum of `numbers` ones must fit")

    @property
    def alphabet(self) -> str:
        return string.digits + "+-*=,:"

    @property
    def max_prompt_tokens(self) -> int:
        return self.numbers * (self._number_width + 1) + self._value_width + 1

    @property
    def max_response_tokens(self) -> int:
        # Three values and two signs a step, and behind it a comma or the end of sequence.
        return (self.numbers - 1) * (3 * self._value_width + 3)

    def prompts(self, rng: np.random.Generator, count: int) -> list[Problem]:
        """Numbers are uniform; targets are uniform over what the numbers can reach."""
        return [self._draw_problem(rng) for _ in range(count)]

    def demonstrations(
        self, rng: np.random.Generator, count: int, slip: float
    ) -> list[tuple[Prompt, str]]:
        """A solver that sees which steps leave the target within reach, and slips.

        With probability `slip` a step is drawn uniformly from all possible steps, which may be a
        good one by luck; else from those that leave the target within reach, while there are any.
        After a slip that loses the target the solver continues with possible steps, in vain.
        """
        problems = self.prompts(rng, count)
        return [(p.prompt, self._demonstrate(rng, p, slip)) for p in problems]

    def reward(
        self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]
    ) -> list[float]:
        """1.0 where a completion reaches its `target` from its `numbers` by the rules, else 0.0."""
        rows = zip(completions, columns["numbers"], columns["target"], strict=True)
        return [float(self._is_right(*row)) for row in rows]

    @cached_property
    def _number_width(self) -> int:
        return len(str(self.max_number))

    @cached_property
    def _value_width(self) -> int:
        return len(str(self.max_value))

    @cached_property
    def _step_pattern(self) -> re.Pattern[str]:
        # At most as many digits as the largest value: int() refuses strings of thousands. Not \d,
        # which takes the digits of other scripts too.
        value = f"([1-9][0-9]{{0,{self._value_width - 1}}})"
        return re.compile(rf"{value}([-+*]){value}={value}")

    def _draw_problem(self, rng: np.random.Generator) -> Problem:
        targets: Pool = ()
        while not targets:  # some numbers reach nothing within max_value: draw others
            numbers = rng.integers(1, self.max_number + 1, self.numbers).tolist()
            targets = reachable_targets(_pool(numbers), self.max_value)
        target = targets[rng.integers(len(targets))]
        shown = ",".join(f"{n:0{self._number_width}d}" for n in numbers)
        return Problem(
            prompt=f"{shown}={target:0{self._value_width}d}:",
            columns={"numbers": tuple(numbers), "target": target},
        )

    def _demonstrate(self, rng: np.random.Generator, problem: Problem, slip: float) -> str:
        pool, target = _pool(problem.columns["numbers"]), problem.columns["target"]
        written = []
        while len(pool) > 1:
            steps = possible_steps(pool, self.max_value)
            good = [s for s in steps if target in reachable_targets(s[1], self.max_value)]
            choices = steps if rng.random() < slip or not good else good
            if not choices:  # every result would leave the range: the solver is stuck
                break
            text, pool = choices[rng.integers(len(choices))]
            written.append(text)
        return ",".join(written)

    def _is_right(self, completion: str, numbers: Sequence[int], target: int) -> bool:
        pool = list(numbers)
        for text in completion.split(","):
            match = self._step_pattern.fullmatch(text)
            if match is None:
                return False
            a, b, result = (int(match[i]) for i in (1, 3, 4))
            if a not in pool:
                return False
            pool.remove(a)
            if b not in pool:
                return False
            pool.remove(b)
            if result != _apply(match[2], a, b) or result > self.max_value:
                return False
            pool.append(result)
        return pool == [target]


def _apply(sign: str, a: int, b: int) -> int:
    return a + b if sign == "+" else a - b if sign == "-" else a * b


def _pool(values: Sequence[int]) -> Pool:
    return tuple(sorted(values, reverse=True))


@lru_cache(maxsize=2**14)
def possible_steps(pool: Pool, max_value: int) -> tuple[tuple[str, Pool], ...]:
    """All distinct steps from `pool`, larger operand first, as (text, pool after the step)."""
    steps: dict[str, Pool] = {}
    for i, j in combinations(range(len(pool)), 2):
        a, b = pool[i], pool[j]
        rest = pool[:i] + pool[i + 1 : j] + pool[j + 1 :]
        for sign in "+-*":
            result = _apply(sign, a, b)
            if 1 <= result <= max_value:
                steps[f"{a}{sign}{b}={result}"] = _pool((*rest, result))
    return tuple(steps.items())


@lru_cache(maxsize=2**16)
def reachable_targets(pool: Pool, max_value: int) -> Pool:
    """All single values that some sequence of steps leaves of `pool`, ascending."""
    if len(pool) == 1:
        return pool
    after = {pool_after for _, pool_after in possible_steps(pool, max_value)}
    return tuple(sorted({t for p in after for t in reachable_targets(p, max_value)}))
