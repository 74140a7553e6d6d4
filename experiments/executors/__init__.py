"""Where the runs of a study are executed: this machine, a Ray cluster, or Slurm.

job.py     what a started run is to the loop over all of them (runner.py)
local.py   processes of this machine
ray.py     tasks of a Ray cluster, with no disk in common
slurm.py   jobs of Slurm, through submitit
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from moe_rl.experiments.executors.job import Executor, Job

__all__ = ["Executor", "ExecutorName", "Job", "make_executor"]

ExecutorName = Literal["local", "ray", "slurm"]


def make_executor(
    name: ExecutorName,
    cold_start_cache: Path,
    *,
    address: str | None = None,
    slurm: Mapping[str, str] | None = None,
) -> Executor:
    """The executor of that name.

    Args:
        name: of the executor.
        cold_start_cache: folder of cold starts.
        address: of a Ray cluster, see `RayExecutor`.
        slurm: options of submitit, see `SlurmExecutor`.

    Raises:
        ConfigError: its package is not installed, or there is no such cluster.
    """
    if name == "ray":
        from moe_rl.experiments.executors.ray import RayExecutor

        return RayExecutor(cold_start_cache, address)
    if name == "slurm":
        from moe_rl.experiments.executors.slurm import SlurmExecutor

        return SlurmExecutor(cold_start_cache, slurm or {})
    from moe_rl.experiments.executors.local import LocalExecutor

    return LocalExecutor(cold_start_cache)
