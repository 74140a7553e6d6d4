"""Runs elsewhere: a Ray cluster that loses a node, Slurm's jobs, equal to runs here bit for bit."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from moe_rl.commands.cli import main
from moe_rl.config import ConfigError, RunConfig
from moe_rl.experiments.executors import make_executor
from moe_rl.experiments.executors.local import LocalExecutor
from moe_rl.experiments.runner import run_all, run_folder
from moe_rl.presets import preset
from moe_rl.run_folder.log import is_complete
from moe_rl.training.cold_start import prepare_cold_starts

CONFIGS = [preset("tiny").replace(seed=seed, steps=4).named() for seed in range(3)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cold")
    prepare_cold_starts(CONFIGS, folder / "starts")
    return folder / "starts"


@pytest.fixture(scope="module")
def here(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study on this machine."""
    root = tmp_path_factory.mktemp("local")
    assert run_all(CONFIGS, root, jobs=2, executor=LocalExecutor(cache)) == []
    return root


def numbers(root: Path, config: RunConfig) -> list[dict[str, Any]]:
    """Every line of a run's logs, but for what is about time."""
    folder = run_folder(root, config)
    assert is_complete(folder)
    lines = [
        json.loads(line)
        for name in ("steps.jsonl", "updates.jsonl")
        for line in (folder / name).read_text().splitlines()
    ]
    return [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in lines]


def assert_equal(one: Path, other: Path) -> None:
    for config in CONFIGS:
        assert numbers(one, config) == numbers(other, config)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without cores, and two nodes with one each."""
    reason = "Ray is not installed: pip install 'moe-rl[ray]'"
    pytest.importorskip("ray", reason=reason, exc_type=ImportError)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.mark.slow
def test_a_ray_cluster_that_loses_a_node_gives_the_same_study(
    cluster: Any, cache: Path, here: Path, tmp_path: Path
) -> None:
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    executor = make_executor("ray", cache, address=cluster.address)
    assert executor.default_jobs() == 2

    def kill_a_busy_node() -> None:
        from ray.util.state import list_tasks

        while not any(task.state == "RUNNING" for task in list_tasks()):
            time.sleep(0.5)
        time.sleep(2)
        cluster.remove_node(nodes[0], allow_graceful=False)

    killer = Thread(target=kill_a_busy_node)
    killer.start()
    failures = run_all(CONFIGS, tmp_path, jobs=2, executor=executor)
    killer.join()
    assert failures == []
    assert_equal(here, tmp_path)


def test_files_of_this_machine_are_refused_on_a_cluster(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed", exc_type=ImportError)
    from moe_rl.experiments.executors.ray import RayExecutor

    loss = tmp_path / "own.py"
    loss.write_text("def mine(inputs): return -inputs.logprobs\n")
    executor = RayExecutor.__new__(RayExecutor)  # what it checks needs no cluster
    executor.check(CONFIGS[0])
    for config, name in (
        (CONFIGS[0].replace(loss=f"{loss}:mine"), "loss"),
        (CONFIGS[0].replace(checkpoint=str(tmp_path)), "checkpoint"),
    ):
        with pytest.raises(ConfigError, match=f"{name}=.*a file of this machine"):
            executor.check(config)


def test_slurm_s_jobs_give_the_same_study(cache: Path, here: Path, tmp_path: Path) -> None:
    """submitit's own local executor runs the jobs as Slurm would."""
    reason = "submitit is not installed: pip install 'moe-rl[slurm]'"
    pytest.importorskip("submitit", reason=reason)
    executor = make_executor("slurm", cache, slurm={"cluster": "local", "timeout_min": "10"})
    assert run_all(CONFIGS, tmp_path, jobs=2, executor=executor) == []
    assert_equal(here, tmp_path)


def test_a_job_of_slurm_that_fails_is_told(cache: Path, tmp_path: Path) -> None:
    pytest.importorskip("submitit", reason="submitit is not installed")
    bad = CONFIGS[0].replace(learning_rate=1e30, warmup_steps=0, setting="bad")
    executor = make_executor("slurm", cache, slurm={"cluster": "local"})
    (failure,) = run_all([bad], tmp_path, jobs=1, executor=executor)
    assert "diverged" in failure.reason


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--executor", "slurm"], "executor='slurm': "),
        (
            ["--executor", "slurm", "--slurm", "cluster", "local", "speed", "9"],
            "executor='slurm': ",
        ),
        (["--executor", "ray", "--address", "127.0.0.1:1"], "address='127.0.0.1:1': no Ray"),
    ],
)
def test_a_cluster_that_is_not_there_gets_one_line(
    options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package = "submitit" if "slurm" in options else "ray"
    pytest.importorskip(package, reason=f"{package} is not installed", exc_type=ImportError)
    given = ["reproduce", "--out", str(tmp_path / "study"), *options]
    assert main(given) == 2
    assert words in capsys.readouterr().err
    assert not os.path.exists(tmp_path / "study")
