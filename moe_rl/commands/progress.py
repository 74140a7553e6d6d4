"""Progress of one run: a bar on a terminal, one aligned line a step elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moe_rl.config import RunConfig


@contextmanager
def run_progress(config: RunConfig) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yields the function to call with each step's metrics."""
    console = Console()
    if not console.is_terminal:
        yield _print_step
        return
    with Progress(
        TextColumn(f"{config.arm} seed {config.seed}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("reward {task.fields[reward]:.3f}"),
        TimeRemainingColumn(),
        console=console,
    ) as progress:
        bar = progress.add_task("", total=config.steps, reward=0.0)
        yield lambda metrics: progress.update(
            bar, completed=metrics["step"] + 1, reward=metrics["reward"]
        )


def _print_step(metrics: dict[str, Any]) -> None:
    print(
        f"step {metrics['step']:>5}  reward {metrics['reward']:.3f}  "
        f"lr {metrics['learning_rate']:.2e}  {metrics['seconds']:.2f} s",
        flush=True,
    )


def print_cold_start(step: int, loss: float) -> None:
    """Print every 50th supervised step of a cold start."""
    if step % 50 == 0:
        print(f"cold start step {step:>5}  loss {loss:.3f}", flush=True)
