"""Runs side by side: one process and one torch thread each, resumable, with one progress display.

Every run is the command `moe-rl train --config FILE --out FOLDER`, so any run of a study can be
repeated alone. Its process is forked from one that has imported torch and transformers already,
which takes as long as four rollout steps. A complete run is skipped; one that was stopped resumes
from its checkpoint; one that was killed before its first starts anew; a run that fails does not
stop the others.
"""

import contextlib
import functools
import json
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from moe_rl.config import ConfigError, RunConfig
from moe_rl.run_folder.log import (
    OUTPUT,
    check_can_be_made,
    check_run_folder,
    is_complete,
    write_config,
)

_POLL_SECONDS = 0.5
_STOP_SECONDS = 120  # a run told to stop ends its rollout step and writes a checkpoint


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A run that ended with an error."""

    folder: Path
    reason: str


def run_folder(root: Path, config: RunConfig) -> Path:
    """Where a study keeps one run: ROOT/runs/SETTING/ARM/seedN."""
    arm = config.named().arm
    return root / "runs" / config.setting / f"{arm}" / f"seed{config.seed}"


def train_words(config: Path, folder: Path, cold_start_cache: Path) -> list[str]:
    """Words behind `moe-rl` that start a run or resume it."""
    words = ["train", "--config", str(config), "--out", str(folder)]
    return [*words, "--cold-start-cache", str(cold_start_cache), "--resume"]


def run_all(
    configs: Sequence[RunConfig], root: Path, *, jobs: int, cold_start_cache: Path
) -> list[Failure]:
    """Run every config that is not complete yet, `jobs` at a time; returns the failures.

    On Ctrl-C or SIGTERM running runs end their rollout step and write a checkpoint, finished ones
    are kept, and KeyboardInterrupt reaches the caller.

    Raises:
        ConfigError: a run folder holds a run of another config; found before anything starts.
    """
    check_study(configs, root, jobs=jobs)
    waiting = deque(c for c in configs if not is_complete(run_folder(root, c)))
    done = len(configs) - len(waiting)
    if done:
        print(f"{done} of {len(configs)} runs are complete already")
    running: list[_Process] = []
    failures: list[Failure] = []
    with _terminate_as_interrupt(), _Display(len(configs), done) as display:
        try:
            while waiting or running:
                while len(running) < jobs and (ready := _first_ready(waiting)) is not None:
                    waiting.remove(ready)
                    running.append(_Process(ready, root, cold_start_cache))
                    display.show_start(running[-1])
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
                for process in list(running):
                    display.show_step(process)
                    if process.running():
                        continue
                    running.remove(process)
                    failure = process.failure()
                    if failure is not None:
                        failures.append(failure)
                    display.show_end(process, failure)
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.wait()
    return failures


def _first_ready(waiting: Iterable[RunConfig]) -> RunConfig | None:
    """The first run whose checkpoint, if it starts from one, has been saved."""
    for config in waiting:
        checkpoint = config.model.checkpoint
        if checkpoint is None or Path(checkpoint, "config.json").is_file():
            return config
    return None


def check_study(configs: Sequence[RunConfig], root: Path, *, jobs: int) -> None:
    """Refuse what cannot work before any work is done.

    Raises:
        ConfigError: no job, two runs in one folder, or a folder that holds another run.
    """
    if jobs < 1:
        raise ConfigError(f"jobs={jobs}: must be at least 1")
    check_can_be_made(root, "out")
    folders = [run_folder(root, config) for config in configs]
    for folder in folders:
        if folders.count(folder) > 1:
            raise ConfigError(
                f"{folder}: two runs of the study would share it; name each value once"
            )
    for folder, config in zip(folders, configs, strict=True):
        check_run_folder(folder, config)


class _Process:
    """One run in a process of its own."""

    bar: TaskID

    def __init__(self, config: RunConfig, root: Path, cold_start_cache: Path) -> None:
        self.title = f"{config.setting} {config.arm} seed {config.seed}"
        self.steps = config.steps
        self.folder = run_folder(root, config)
        self.started = time.monotonic()
        check_run_folder(self.folder, config)
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "config.json"
        write_config(file, config)
        output = self.folder / OUTPUT
        output.write_bytes(b"")  # there to be read if the process dies before it writes
        words = train_words(file, self.folder, cold_start_cache)
        self._process = _server().Process(target=_train, args=(words, output))
        self._process.start()

    def running(self) -> bool:
        return self._process.is_alive()

    def terminate(self) -> None:
        self._process.terminate()

    def wait(self) -> None:
        self._process.join(timeout=_STOP_SECONDS)
        self._process.kill()
        self._process.join()

    def failure(self) -> Failure | None:
        code = self._process.exitcode or 0
        if code == 0 and is_complete(self.folder):
            return None
        lines = (self.folder / OUTPUT).read_text(encoding="utf-8").strip().splitlines()
        if code < 0:
            reason = f"killed by {signal.Signals(-code).name}"
        else:
            reason = f"exit code {code}: {lines[-1] if lines else 'no output'}"
        return Failure(folder=self.folder, reason=reason)

    def last_step(self) -> dict[str, float] | None:
        """The newest whole line of steps.jsonl, None before the first."""
        try:
            lines = (self.folder / "steps.jsonl").read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:
            return None
        return json.loads(lines[-1]) if lines else None


@functools.cache
def _server() -> ForkServerContext:
    """The process that runs are forked from; it starts with the first of them."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["moe_rl.commands.cli", "moe_rl.training.trainer"])
    return server


def _train(words: Sequence[str], output: Path) -> None:
    """One run, as `moe-rl WORDS` in a process of its own, with its output in that file."""
    os.setsid()  # Ctrl-C reaches the study alone, which then stops its runs
    with output.open("wb", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    from moe_rl.commands.cli import main

    sys.exit(main(words))


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

    def show_start(self, process: _Process) -> None:
        process.bar = self.add_task(process.title, total=process.steps, note="starting")

    def show_step(self, process: _Process) -> None:
        step = process.last_step()
        if step is not None:
            note = f"reward {step['reward']:.3f}"
            self.update(process.bar, completed=step["step"] + 1, note=note)

    def show_end(self, process: _Process, failure: Failure | None) -> None:
        self.remove_task(process.bar)
        self._done += 1
        self.update(self._study, completed=self._done)
        step = process.last_step()
        reward = f"reward {step['reward']:.3f}" if step else "no step"
        seconds = time.monotonic() - process.started
        outcome = f"FAILED, {failure.reason}" if failure else f"{reward}  {seconds:5.0f} s"
        line = f"{self._done:>4}/{self._runs}  {process.title:<34} {outcome}"
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)
