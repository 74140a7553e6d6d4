"""Runs elsewhere: a Ray cluster that loses a node, Slurm's jobs, equal to runs here bit for bit."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from moe_rl.commands.cli import main
from moe_rl.config import ConfigError
from moe_rl.experiments.bench.lost_node import LostNode, compare
from moe_rl.experiments.executors import make_executor
from moe_rl.experiments.executors.job import train_words
from moe_rl.experiments.executors.local import LocalExecutor
from moe_rl.experiments.runner import run_all
from moe_rl.presets import preset
from moe_rl.run_folder.log import write_config
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


@pytest.mark.slow
def test_a_ray_cluster_that_loses_a_node_gives_the_same_study(cache: Path, tmp_path: Path) -> None:
    reason = "Ray is not installed: pip install 'moe-rl[ray]'"
    pytest.importorskip("ray", reason=reason, exc_type=ImportError)

    assert LostNode(runs=3).run(tmp_path, cache) == 3 * (4 + 4 * 4)


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
    assert compare(CONFIGS, here, tmp_path) > 0


def test_a_time_limit_of_slurm_leaves_a_checkpoint(cache: Path, tmp_path: Path) -> None:
    """Slurm sends SIGUSR2 to every process of the job, the run's too."""
    pytest.importorskip("submitit", reason="submitit is not installed")
    from moe_rl.experiments.executors.slurm import train as job

    config = CONFIGS[0].replace(steps=5000)
    folder = tmp_path / "run"
    folder.mkdir()
    write_config(folder / "config.json", config)
    words = train_words(folder / "config.json", folder, cache)
    process = multiprocessing.get_context("fork").Process(
        target=job, args=(words, str(tmp_path / "output.txt"))
    )
    process.start()
    while not (folder / "steps.jsonl").is_file():
        time.sleep(0.2)
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        os.kill(int(child), signal.SIGUSR2)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGUSR2)
    process.join(timeout=60)
    assert (folder / "checkpoints" / "latest").is_file()


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
