"""Runs as tasks of a Ray cluster, one core each, with no disk in common.

A task gets its config, its cold start and what an earlier attempt has left as bytes of files, runs
`moe-rl train` in a folder of its own, and returns the files of its run folder through the object
store. A node that dies costs the runs that were on it: Ray starts them on another one. moe-rl has
to be installed on every node, in the same version.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_rl.config import ConfigError, RunConfig
from moe_rl.experiments.executors.job import Job, exit_reason, train_words
from moe_rl.run_folder.log import OUTPUT, is_complete
from moe_rl.runtime.extras import import_extra

Files = Mapping[str, bytes]
_CONNECT_SECONDS = 10
_RETRIES = 8  # of a task whose node died


class RayExecutor:
    """Starts runs as tasks of a cluster.

    Args:
        cold_start_cache: folder of cold starts, on this machine.
        address: of the cluster; "auto": the one that this machine is a node of; None: one on this
            machine for as long as the study takes.

    Raises:
        ConfigError: Ray is not installed, or there is no cluster at the address.
    """

    def __init__(self, cold_start_cache: Path, address: str | None) -> None:
        self._ray = ray = import_extra("ray", extra="ray", option="executor='ray'")
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        if not ray.is_initialized():
            try:
                _require_answer(address)
                ray.init(address or "local", log_to_driver=False, include_dashboard=False)
            except (OSError, RuntimeError, ValueError) as error:
                if address is None:
                    raise
                raise ConfigError(
                    f"address={address!r}: no Ray cluster there ({error!s:.120}); start one with "
                    "`ray start --head`, or leave address out"
                ) from error
        self._cold_start_cache = cold_start_cache
        self._cold_starts: dict[str, Any] = {}
        self._task = ray.remote(num_cpus=1, max_retries=_RETRIES)(run_files)

    def default_jobs(self) -> int:
        """As many as the cluster has cores for."""
        return max(1, int(self._ray.cluster_resources().get("CPU", 1)))

    def check(self, config: RunConfig) -> None:
        """Refuse a run that reads files of this machine: its node may have none of them."""
        task = config.task
        for name, value in (
            ("checkpoint", config.model.checkpoint),
            ("loss", config.loss and config.loss.rpartition(":")[0]),
            ("dataset", task.dataset),
            ("evaluation_dataset", task.evaluation_dataset),
            ("reward", task.reward and task.reward.rpartition(":")[0]),
        ):
            # A checkpoint that another run of the study is to save is not there yet.
            here = value is not None and (Path(value).exists() or value.count("/") > 1)
            if here:
                raise ConfigError(
                    f"{name}={value!r}: a file of this machine, which the nodes of a Ray cluster "
                    "need not have; use --executor local or slurm"
                )

    def start(self, config: RunConfig, folder: Path) -> Job:
        """Submit a run, with what an earlier attempt has left of it."""
        return RayJob(config, folder, self)

    def submit(self, config: RunConfig, folder: Path) -> Any:
        """The future of a run's files."""
        return self._task.remote(read_files(folder), self._cold_start(config))

    def get(self, future: Any) -> tuple[int, Files]:
        """Exit code and files of a run that has ended."""
        return self._ray.get(future)

    def ended(self, future: Any) -> bool:
        """Whether a run has ended, by success or by failure."""
        return bool(self._ray.wait([future], timeout=0)[0])

    def cancel(self, future: Any) -> None:
        """End a run; as it has no disk in common, nothing of it is kept."""
        self._ray.cancel(future, force=True)

    def _cold_start(self, config: RunConfig) -> Any:
        """The files of a run's cold start, put into the object store once."""
        from moe_rl.tasks import task_of
        from moe_rl.training.cold_start import cold_start_hash

        if config.sft_steps == 0:
            return {}
        task = task_of(config.task)
        name = cold_start_hash(config, task)
        if name not in self._cold_starts:
            files = read_files(self._cold_start_cache / name)
            inside = {f"{name}/{path}": content for path, content in files.items()}
            self._cold_starts[name] = self._ray.put(inside)
        return self._cold_starts[name]


def _require_answer(address: str | None) -> None:
    """Raise OSError where nobody listens at HOST:PORT: Ray itself tries for ten minutes."""
    host, _, port = (address or "").rpartition(":")
    if host and "/" not in host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()


class RayJob(Job):
    """One run on some node."""

    def __init__(self, config: RunConfig, folder: Path, executor: RayExecutor) -> None:
        super().__init__(config, folder)
        self._executor = executor
        self._future = executor.submit(config, folder)
        self._reason: str | None = None
        self._fetched = False

    def running(self) -> bool:
        """See `Job`; a run that has ended is fetched."""
        if not self._executor.ended(self._future):
            return True
        if not self._fetched:
            self._fetched = True
            self._fetch()
        return False

    def stop(self) -> None:
        """See `Job`; here what it has done since it was started is lost."""
        if not self._fetched:
            self._executor.cancel(self._future)
            self._fetched, self._reason = True, "stopped"

    def wait(self, until: float) -> None:
        """See `Job`."""

    def error(self) -> str | None:
        """See `Job`."""
        return self._reason

    def _fetch(self) -> None:
        try:
            code, files = self._executor.get(self._future)
        except Exception as error:  # noqa: BLE001 -- Ray's errors are of many classes
            self._reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            return
        write_files(self.folder, files)
        self._reason = exit_reason(code, self.folder)


def run_files(run: Files, cold_starts: Files) -> tuple[int, Files]:
    """Train a run whose folder holds `run`; returns the exit code and the folder's files."""
    with tempfile.TemporaryDirectory() as folder:
        here, cache = Path(folder) / "run", Path(folder) / "cold_starts"
        write_files(here, run)
        write_files(cache, cold_starts)
        words = train_words(here / "config.json", here, cache)
        with (here / OUTPUT).open("wb") as log:
            done = subprocess.run(
                [sys.executable, "-m", "moe_rl", *words],
                stdout=log,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if done.returncode == 0 and is_complete(here):
            # What only a run under way needs would be most of the bytes.
            shutil.rmtree(here / "checkpoints", ignore_errors=True)
        return done.returncode, read_files(here)


def read_files(folder: Path) -> dict[str, bytes]:
    """The files of a folder by their paths in it."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "lock"
    }


def write_files(folder: Path, files: Files) -> None:
    """Write them; the files that say that a run is complete come last."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in sorted(files, key=lambda name: name == "summary.json"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".part")
        partial.write_bytes(files[name])
        os.replace(partial, path)
