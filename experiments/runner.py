"""Runs side by side: one torch thread each, resumable, with one progress display.

Every run is the command `moe-rl train --config FILE --out FOLDER`, so any run of a study can be
repeated alone; where it is executed is the executor's to say (executors/). A complete run is
skipped; one that was stopped resumes from its checkpoint; one that was killed before its first
starts anew; a run that fails does not stop the others.
"""

import contextlib
import signal
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from moe_rl.config import ConfigError, RunConfig
from moe_rl.experiments.executors import Executor, Job
from moe_rl.experiments.executors.job import STOP_SECONDS
from moe_rl.run_folder.log import check_can_be_made, check_run_folder, is_complete

_POLL_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A run that ended with an error."""

    folder: Path
    reason: str


def run_folder(root: Path, config: RunConfig) -> Path:
    """Where a study keeps one run: ROOT/runs/SETTING/ARM/seedN."""
    arm = config.named().arm
    return root / "runs" / config.setting / f"{arm}" / f"seed{config.seed}"


def run_all(
    configs: Sequence[RunConfig], root: Path, *, jobs: int, executor: Executor
) -> list[Failure]:
    """Run every config that is not complete yet, `jobs` at a time; returns the failures.

    On Ctrl-C or SIGTERM running runs end their rollout step and write a checkpoint, finished ones
    are kept, and KeyboardInterrupt reaches the caller.

    Raises:
        ConfigError: a run folder holds a run of another config, or a run cannot be executed there;
            found before anything starts.
    """
    check_study(configs, root, jobs=jobs)
    for config in configs:
        executor.check(config)
    waiting = deque(c for c in configs if not is_complete(run_folder(root, c)))
    done = len(configs) - len(waiting)
    if done:
        print(f"{done} of {len(configs)} runs are complete already")
    running: dict[Job, TaskID] = {}
    failures: list[Failure] = []
    with _terminate_as_interrupt(), _Display(len(configs), done) as display:
        try:
            while waiting or running:
                while len(running) < jobs and (ready := _first_ready(waiting)) is not None:
                    waiting.remove(ready)
                    job = executor.start(ready, run_folder(root, ready))
                    running[job] = display.show_start(job)
                if waiting and not running:
                    failures += [
                        Failure(
                            folder=run_folder(root, config),
                            reason=f"its checkpoint {config.model.checkpoint} was never saved",
                        )
                        for config in waiting
                    ]
                    break
                time.sleep(_POLL_SECONDS)
                for job, bar in list(running.items()):
                    display.show_step(job, bar)
                    if job.running():
                        continue
                    del running[job]
                    reason = job.error()
                    if reason is not None:
                        failures.append(Failure(folder=job.folder, reason=reason))
                    display.show_end(job, bar, reason)
        finally:
            for job in running:
                job.stop()
            until = time.monotonic() + STOP_SECONDS
            for job in running:
                job.wait(until)
    return failures


def _first_ready(waiting: Iterable[RunConfig]) -> RunConfig | None:
    """The first run whose checkpoint, if it starts from one, has been saved."""
    for config in waiting:
        checkpoint = config.model.checkpoint
        if checkpoint is None or Path(checkpoint, "config.json").is_file():
            return config
    return None


def check_study(configs: Sequence[RunConfig], root: Path, *, jobs: int | None) -> None:
    """Refuse what cannot work before any work is done.

    Raises:
        ConfigError: no job, two runs in one folder, or a folder that holds another run.
    """
    if jobs is not None and jobs < 1:
        raise ConfigError(f"jobs={jobs}: must be at least 1")
    check_can_be_made(root, "out")
    folders = [run_folder(root, config) for config in configs]
    for folder, config in zip(folders, configs, strict=True):
        if folders.count(folder) > 1:
            raise ConfigError(
                f"arm {config.named().arm} with seed {config.seed} is asked for twice: both runs "
                f"would share {folder}; name each value once"
            )
    for folder, config in zip(folders, configs, strict=True):
        check_run_folder(folder, config)


@contextlib.contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM, and SIGHUP of a closed terminal, stop the study as Ctrl-C does."""

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = {s: signal.signal(s, interrupt) for s in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Display(Progress):
    """Bars on a terminal, one a running run and one for all; elsewhere one line a finished run."""

    def __init__(self, runs: int, done: int) -> None:
        console = Console()
        super().__init__(
            TextColumn("{task.description:<34}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:>4.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[note]:<14}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._runs, self._done = runs, done
        self._study = self.add_task("runs", total=runs, completed=done, note="")

    def show_start(self, job: Job) -> TaskID:
        return self.add_task(job.title, total=job.steps, note="starting")

    def show_step(self, job: Job, bar: TaskID) -> None:
        step = job.last_step()
        if step is not None:
            note = f"reward {step['reward']:.3f}"
            self.update(bar, completed=step["step"] + 1, note=note)

    def show_end(self, job: Job, bar: TaskID, reason: str | None) -> None:
        self.remove_task(bar)
        self._done += 1
        self.update(self._study, completed=self._done)
        step = job.last_step()
        reward = f"reward {step['reward']:.3f}" if step else "no step"
        seconds = time.monotonic() - job.started
        outcome = f"FAILED, {reason}" if reason else f"{reward}  {seconds:5.0f} s"
        line = f"{self._done:>4}/{self._runs}  {job.title:<34} {outcome}"
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)
