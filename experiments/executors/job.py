"""One run somewhere: what the loop over a study's runs needs to know of it."""

import abc
import json
import signal
import time
from pathlib import Path
from typing import Protocol

from moe_rl.config import RunConfig
from moe_rl.run_folder.log import OUTPUT, check_run_folder, is_complete, write_config

STOP_SECONDS = 120
"""Seconds that a run has after `stop` to end its rollout step and write a checkpoint, until it is
killed."""


class Job(abc.ABC):
    """A run that has been started; its folder and its config are there.

    Raises:
        ConfigError: the folder holds a run of another config.
    """

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self.title = f"{config.setting} {config.arm} seed {config.seed}"
        self.steps = config.steps
        self.folder = folder
        self.started = time.monotonic()
        check_run_folder(folder, config)
        folder.mkdir(parents=True, exist_ok=True)
        write_config(folder / "config.json", config)

    @abc.abstractmethod
    def running(self) -> bool:
        """Whether it has not ended yet."""

    @abc.abstractmethod
    def stop(self) -> None:
        """Ask it to end, as it does at SIGTERM: after a rollout step, with a checkpoint."""

    @abc.abstractmethod
    def wait(self, until: float) -> None:
        """Return when it has ended after `stop`, or has been made to at that `time.monotonic()`."""

    @abc.abstractmethod
    def error(self) -> str | None:
        """Why a run that has ended is not complete; None: it is."""

    def last_step(self) -> dict[str, float] | None:
        """The newest whole line of steps.jsonl, None before the first."""
        try:
            lines = (self.folder / "steps.jsonl").read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:
            return None
        return json.loads(lines[-1]) if lines else None


class Executor(Protocol):
    """Where runs are executed."""

    def default_jobs(self) -> int:
        """How many runs at a time, unless the user says."""

    def check(self, config: RunConfig) -> None:
        """Refuse a run that cannot be executed there.

        Raises:
            ConfigError: names what it needs.
        """

    def start(self, config: RunConfig, folder: Path) -> Job:
        """Start a run in `folder`, or resume it."""


def train_words(config: Path, folder: Path, cold_start_cache: Path) -> list[str]:
    """Words behind `moe-rl` that start a run or resume it."""
    words = ["train", "--config", str(config), "--out", str(folder)]
    return [*words, "--cold-start-cache", str(cold_start_cache), "--resume"]


def exit_reason(code: int, folder: Path) -> str | None:
    """Why a run whose process ended with `code` is not complete; None: it is."""
    if code == 0 and is_complete(folder):
        return None
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    output = folder / OUTPUT
    lines = output.read_text(encoding="utf-8").strip().splitlines() if output.is_file() else []
    return f"exit code {code}: {lines[-1] if lines else 'no output'}"
