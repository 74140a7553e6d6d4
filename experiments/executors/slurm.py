"""Runs as jobs of a Slurm cluster, through submitit, one core each, on a disk in common.

A job is `moe-rl train` on the study's own folders, so that it resumes from its checkpoint after a
time limit or a preemption, when the same command is given again.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_rl.config import ConfigError, RunConfig
from moe_rl.experiments.executors.job import Job, exit_reason, train_words
from moe_rl.run_folder.log import OUTPUT
from moe_rl.runtime.extras import import_extra

_AT_A_TIME = 256


class SlurmExecutor:
    """Submits runs as jobs.

    Args:
        cold_start_cache: folder of cold starts, on the disk that all nodes see.
        options: of submitit's AutoExecutor, such as slurm_partition and timeout_min; `cluster`
            chooses "slurm" (default), or "local" to try it without one.

    Raises:
        ConfigError: submitit is not installed, there is no Slurm here, or an option is unknown.
    """

    def __init__(self, cold_start_cache: Path, options: Mapping[str, str]) -> None:
        submitit = import_extra("submitit", extra="slurm", option="executor='slurm'")
        given = {key: int(value) if value.isdigit() else value for key, value in options.items()}
        cluster = str(given.pop("cluster", "slurm"))
        try:
            self._executor = submitit.AutoExecutor(
                folder=cold_start_cache.parent / "slurm", cluster=cluster
            )
            self._executor.update_parameters(**({"cpus_per_task": 1, "name": "moe-rl"} | given))
        except (RuntimeError, NameError, ValueError) as error:
            raise ConfigError(f"executor='slurm': {error!s:.200}; see --slurm") from error
        self._cold_start_cache = cold_start_cache.absolute()

    def default_jobs(self) -> int:
        """Most are left to Slurm's queue."""
        return _AT_A_TIME

    def check(self, config: RunConfig) -> None:
        """Refuse nothing: any run can be executed here."""

    def start(self, config: RunConfig, folder: Path) -> Job:
        """Submit a run, or one that resumes."""
        return SlurmJob(config, folder.absolute(), self._executor, self._cold_start_cache)


class SlurmJob(Job):
    """One run in a job."""

    def __init__(
        self, config: RunConfig, folder: Path, executor: Any, cold_start_cache: Path
    ) -> None:
        super().__init__(config, folder)
        words = train_words(folder / "config.json", folder, cold_start_cache)
        self._job = executor.submit(train, words, str(folder / OUTPUT))

    def running(self) -> bool:
        """See `Job`."""
        return not self._job.done()

    def stop(self) -> None:
        """See `Job`."""
        self._job.cancel(check=False)

    def wait(self, until: float) -> None:
        """See `Job`; what has not ended by then is Slurm's to end."""
        while self.running() and time.monotonic() < until:
            time.sleep(1)

    def error(self) -> str | None:
        """See `Job`."""
        failed = self._job.exception()
        if failed is not None:
            return f"{type(failed).__name__}: {' '.join(str(failed).split())[:200]}"
        return exit_reason(int(self._job.result()), self.folder)


def train(words: Sequence[str], output: str) -> int:
    """`moe-rl WORDS` with its output in a file; returns the exit code.

    Before a time limit or a preemption Slurm sends SIGUSR2 to all processes of the job: the run
    gets SIGTERM instead, at which it ends its rollout step and writes a checkpoint.
    """
    with open(output, "wb") as log:
        running = subprocess.Popen(
            [sys.executable, "-m", "moe_rl", *words],
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN),
        )

        def end(number: int, frame: object) -> None:
            running.terminate()

        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, end)
        return running.wait()
