"""Runs on this machine: one process and one torch thread each.

A process is forked from one that has imported torch and transformers already, which takes as long
as four rollout steps.
"""

import functools
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

from moe_rl.config import RunConfig
from moe_rl.experiments.executors.job import Job, exit_reason, train_words
from moe_rl.run_folder.log import OUTPUT
from moe_rl.runtime.cores import cores


class LocalExecutor:
    """Starts runs as processes of this machine.

    Args:
        cold_start_cache: folder of cold starts.
    """

    def __init__(self, cold_start_cache: Path) -> None:
        self._cold_start_cache = cold_start_cache
        _server()  # imports beside the cold start, which takes one core

    def default_jobs(self) -> int:
        """As many as there are cores for."""
        return cores()

    def check(self, config: RunConfig) -> None:
        """Refuse nothing: any run can be executed here."""

    def start(self, config: RunConfig, folder: Path) -> Job:
        """Start a run, or resume it."""
        return LocalJob(config, folder, self._cold_start_cache)


class LocalJob(Job):
    """One run in a process of its own."""

    def __init__(self, config: RunConfig, folder: Path, cold_start_cache: Path) -> None:
        super().__init__(config, folder)
        output = folder / OUTPUT
        output.write_bytes(b"")  # there to be read if the process dies before it writes
        words = train_words(folder / "config.json", folder, cold_start_cache)
        self._process = _server().Process(target=_train, args=(words, output))
        self._process.start()

    def running(self) -> bool:
        """See `Job`."""
        return self._process.is_alive()

    def stop(self) -> None:
        """See `Job`."""
        self._process.terminate()

    def wait(self, until: float) -> None:
        """See `Job`."""
        self._process.join(timeout=max(0.0, until - time.monotonic()))
        self._process.kill()
        self._process.join()

    def error(self) -> str | None:
        """See `Job`."""
        return exit_reason(self._process.exitcode or 0, self.folder)


@functools.cache
def _server() -> ForkServerContext:
    """The process that runs are forked from, started; its imports take a while."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["moe_rl.commands.cli", "moe_rl.training.trainer"])
    forkserver.ensure_running()
    return server


def _train(words: Sequence[str], output: Path) -> None:
    """One run, as `moe-rl WORDS` in a process of its own, with its output in that file."""
    os.setsid()  # Ctrl-C reaches the study alone, which then stops its runs
    with output.open("wb", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    from moe_rl.commands.cli import main

    sys.exit(main(words))
