"""Tasks: verifiable rewards, offline and seeded, one task a file; this file finds them by name.

task = make_task("running_sum", digits=16)
problems = task.prompts(numpy.random.default_rng(0), count=32)
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any

from moe_rl.tasks.base import Listed, Problem, Task
from moe_rl.tasks.countdown import Countdown
from moe_rl.tasks.dataset import Dataset
from moe_rl.tasks.running_sum import RunningSum

__all__ = [
    "TASKS",
    "Countdown",
    "Dataset",
    "Listed",
    "Problem",
    "RunningSum",
    "Task",
    "make_task",
]

TASKS: dict[str, type[RunningSum] | type[Countdown] | type[Dataset]] = {
    task.name: task for task in (RunningSum, Countdown, Dataset)
}


def make_task(name: str, **options: Any) -> Task:
    """The task `name` with `options`, which are the fields of its class.

    Raises:
        ValueError: for an unknown task or option, with the nearest one, or an option out of range.
    """
    if name not in TASKS:
        raise ValueError(f"task is {name!r}; {_expected(name, TASKS)}")
    task = TASKS[name]
    fields = [field.name for field in dataclasses.fields(task)]
    for option in options:
        if option not in fields:
            raise ValueError(f"{name} got the option {option!r}; {_expected(option, fields)}")
    return task(**options)


def _expected(given: str, known: Iterable[str]) -> str:
    names = list(known)
    nearest = difflib.get_close_matches(given, names, n=1, cutoff=0.0)[0]
    return f"expected one of {', '.join(names)}: did you mean {nearest!r}?"
