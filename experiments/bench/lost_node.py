"""Does a study survive the loss of a node of its Ray cluster, with the results of one machine?

    python -m moe_rl.experiments.bench.lost_node --runs 4

Starts a cluster of two nodes on this machine, kills one of them while both are at work, and
compares every logged number but times with those of the same runs without Ray.
"""

import os
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from moe_rl.config import RunConfig
from moe_rl.experiments.bench.soak import LOGS, untimed
from moe_rl.experiments.executors.local import LocalExecutor
from moe_rl.experiments.executors.ray import RayExecutor
from moe_rl.experiments.runner import run_all, run_folder
from moe_rl.presets import preset
from moe_rl.runtime.extras import import_extra
from moe_rl.training.cold_start import prepare_cold_starts


@dataclass(frozen=True, kw_only=True)
class LostNode:
    """Kill a node of a Ray cluster in the middle of a study, and compare with one machine."""

    runs: int = 4
    """Runs of the study, of a few seconds each."""
    steps: int = 4
    """Rollout steps of a run."""

    def run(self, root: Path, cold_starts: Path) -> int:
        """The number of logged lines compared.

        Raises:
            RuntimeError: a run failed, or a number differs.
        """
        configs = [
            preset("tiny").replace(seed=seed, steps=self.steps).named() for seed in range(self.runs)
        ]
        prepare_cold_starts(configs, cold_starts)
        say("the study on this machine, without Ray")
        _require_none(run_all(configs, root / "local", jobs=2, executor=LocalExecutor(cold_starts)))
        say("the same on a Ray cluster of two nodes with one core each")
        _require_none(_on_cluster(configs, root / "ray", cold_starts))
        return compare(configs, root / "local", root / "ray")


def _on_cluster(configs: Sequence[RunConfig], root: Path, cold_starts: Path) -> list[Any]:
    ray = import_extra("ray", extra="ray", option="lost_node")
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        executor = RayExecutor(cold_starts, cluster.address)

        def kill_a_busy_node() -> None:
            while ray.available_resources().get("CPU", 0) > 0:
                time.sleep(0.2)
            time.sleep(2)
            cluster.remove_node(nodes[0], allow_graceful=False)
            say("killed one node while both had a run")

        killer = threading.Thread(target=kill_a_busy_node)
        killer.start()
        failures = run_all(configs, root, jobs=2, executor=executor)
        killer.join()
        return failures
    finally:
        ray.shutdown()
        cluster.shutdown()


def compare(configs: Sequence[RunConfig], one: Path, other: Path) -> int:
    """Require that two studies have logged the same numbers, bit for bit; returns how many lines.

    Raises:
        RuntimeError: names the first line that differs.
    """
    lines = 0
    for config in configs:
        for name in LOGS:
            pair = [untimed(run_folder(root, config) / name) for root in (one, other)]
            for number, (first, second) in enumerate(zip(*pair, strict=True), start=1):
                if first != second:
                    raise RuntimeError(f"{run_folder(other, config)}/{name}, line {number} differs")
                lines += 1
    return lines


def _require_none(failures: Sequence[Any]) -> None:
    if failures:
        raise RuntimeError(f"{failures[0].folder}: {failures[0].reason}")


def say(words: str) -> None:
    """A line with the time."""
    print(f"{time.strftime('%H:%M:%S')} {words}", flush=True)


def main() -> int:
    """Run it, and print what was compared."""
    settings = tyro.cli(LostNode)
    with tempfile.TemporaryDirectory() as folder:
        lines = settings.run(Path(folder), Path(folder) / "cold_starts")
    say(f"{lines} lines of {settings.runs} runs are equal, bit for bit")
    return 0


if __name__ == "__main__":
    sys.exit(main())
