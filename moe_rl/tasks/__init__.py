"""Tasks: verifiable rewards, offline and seeded, one task per file; `make_task` finds them by name.

task = make_task("running_sum", digits=16)
problems = task.prompts(numpy.random.default_rng(0), count=32)
"""

from typing import Any

from moe_rl.tasks.base import Problem, Prompt, Task
from moe_rl.tasks.countdown import Countdown
from moe_rl.tasks.dataset import Dataset
from moe_rl.tasks.running_sum import RunningSum
from moe_rl.tasks.settings import TaskConfig

__all__ = [
    "TASKS",
    "Countdown",
    "Dataset",
    "Problem",
    "Prompt",
    "RunningSum",
    "Task",
    "make_task",
    "task_of",
]

TASKS: dict[str, type[RunningSum] | type[Countdown] | type[Dataset]] = {
    task.name: task for task in (RunningSum, Countdown, Dataset)
}


def task_of(config: TaskConfig) -> Task:
    """The task of a run; raises as `make_task`."""
    return make_task(config.task, **config.options())


def make_task(name: str, **options: Any) -> Task:
    """The task `name` with `options`, which are the fields of its class.

    Raises:
        ValueError: an unknown task, or an option out of range.
        TypeError: an unknown option.
    """
    if name not in TASKS:
        raise ValueError(f"task={name!r}: unknown task; choose one of {', '.join(TASKS)}")
    return TASKS[name](**options)
