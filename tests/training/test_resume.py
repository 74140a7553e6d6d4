"""An interrupted run that goes on is bit for bit the run that was never interrupted."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from runs import Killed, assert_same_run, killed_after, lines

from moe_rl.config import ConfigError, RunConfig, preset
from moe_rl.tasks import make_task
from moe_rl.training.cold_start import ensure_cold_start
from moe_rl.training.run import train


def config(**changes: Any) -> RunConfig:
    every = {"steps": 2, "sft_steps": 300, "checkpoint_every": 1, "save_every": 2}
    return preset("tiny").replace(**every | changes).named()


@pytest.fixture(scope="module")
def cold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cold")


def killed_run(run: Path, cold: Path) -> Path:
    """A run that died in its seventh update; gives its newest checkpoint."""
    with pytest.raises(Killed), killed_after(6):
        train(config(), run, cold_start_cache=cold)
    return run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()


VARIANTS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "R2": {"routing_replay": "R2"},
    "R3 under noise": {"routing_replay": "R3", "router_noise": 0.3, "algorithm": "gspo"},
    "engine's log-probs": {"old_logprobs": "rollout"},
    "frozen router": {"freeze_router": True},
    "no instruments": {"instruments": False},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_interrupted_after_every_update_the_run_is_bitwise_the_same(
    changes: dict[str, Any], tmp_path: Path, cold: Path
) -> None:
    """Killed in each of its 8 updates, one after the other; 4 updates a rollout, 2 rollouts."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    train(config(**changes), whole, cold_start_cache=cold)
    assert all(line["grad_norm"] > 0 for line in lines(whole, "updates.jsonl")), "nothing to lose"
    deaths = 0
    while True:
        with contextlib.suppress(Killed), killed_after(1):
            train(config(**changes), run, cold_start_cache=cold, resume=True)
            break
        deaths += 1
    assert deaths == 7
    assert_same_run(run, whole)


@pytest.mark.parametrize("every", [3, 4, 5])
def test_lines_behind_the_checkpoint_are_written_anew(
    every: int, tmp_path: Path, cold: Path
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    changed = config(checkpoint_every=every)
    train(changed, whole, cold_start_cache=cold)
    with pytest.raises(Killed), killed_after(7):
        train(changed, run, cold_start_cache=cold)
    with (run / "updates.jsonl").open("a") as file:
        file.write('{"step": 1, "upd')
    train(changed, run, cold_start_cache=cold, resume=True)
    assert_same_run(run, whole)


def test_a_damaged_newest_checkpoint_costs_updates_but_no_bits(tmp_path: Path, cold: Path) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    train(config(), whole, cold_start_cache=cold)
    newest = killed_run(run, cold)
    weights = newest / "policy" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    told: list[str] = []
    train(config(), run, cold_start_cache=cold, resume=True, on_damage=told.append)
    assert len(told) == 1 and str(weights) in told[0]
    assert_same_run(run, whole)


def test_the_time_of_an_interrupted_step_holds_its_first_part(tmp_path: Path, cold: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(Killed), killed_after(2):
        train(config(), run, cold_start_cache=cold)
    train(config(), run, cold_start_cache=cold, resume=True)
    for line in map(json.loads, (run / "steps.jsonl").read_text().splitlines()):
        parts = sum(value for name, value in line.items() if name.startswith("seconds_"))
        assert 0 < parts <= line["seconds"]


@pytest.mark.parametrize("name", ["steps", "updates"])
def test_log_lines_that_were_changed_are_told(name: str, tmp_path: Path, cold: Path) -> None:
    """And nothing is cut: the other log may be what is left of the run."""
    run = tmp_path / "run"
    with pytest.raises(Killed), killed_after(7):
        train(config(checkpoint_every=5), run, cold_start_cache=cold)
    log = run / f"{name}.jsonl"
    log.write_text(log.read_text().replace('"learning_rate": 0.', '"learning_rate": 1.'))
    before = {path.name: path.read_bytes() for path in run.glob("*.json*")}
    with pytest.raises(ConfigError, match=rf"{name}\.jsonl: its first \d+ bytes are not those of"):
        train(config(checkpoint_every=5), run, cold_start_cache=cold, resume=True)
    assert {path.name: path.read_bytes() for path in run.glob("*.json*")} == before


def test_a_checkpoint_that_is_whole_again_does_not_come_back(tmp_path: Path, cold: Path) -> None:
    """The run has gone back behind it, and its logs are cut."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    train(config(), whole, cold_start_cache=cold)
    newest = killed_run(run, cold)
    (newest / "notes.txt").write_text("")
    told: list[str] = []
    with pytest.raises(Killed), killed_after(0):
        train(config(), run, cold_start_cache=cold, resume=True, on_damage=told.append)
    assert "notes.txt: not a file of this folder" in told[0]
    (newest.with_name(f".damaged-{newest.name}") / "notes.txt").unlink()
    train(config(), run, cold_start_cache=cold, resume=True)
    assert_same_run(run, whole)


def test_a_run_without_checkpoints_says_that_it_starts_anew(tmp_path: Path, cold: Path) -> None:
    run = tmp_path / "run"
    killed_run(run, cold)
    shutil.rmtree(run / "checkpoints")
    told: list[str] = []
    train(config(), run, cold_start_cache=cold, resume=True, on_damage=told.append)
    (message,) = told
    assert "no checkpoint to go on from; the run starts anew, and its 6 logged updates" in message


def test_the_best_checkpoint_is_that_of_the_best_reward(tmp_path: Path, cold: Path) -> None:
    """As rollouts have shown it: a step's reward is of the policy before its updates."""
    train(config(checkpoint_every=4), tmp_path / "run", cold_start_cache=cold)
    rewards = [line["reward"] for line in lines(tmp_path / "run", "steps.jsonl")]
    scores = [
        json.loads((path / "manifest.json").read_text())["score"]
        for path in sorted((tmp_path / "run" / "checkpoints").glob("0*"))
    ]
    assert scores == rewards[: len(scores)] and scores[0] > 0


def test_dropout_draws_nothing_where_activations_are_recomputed(tmp_path: Path, cold: Path) -> None:
    """Recomputing needs training mode; dropout's draws are decided by no seed of ours."""
    start = ensure_cold_start(config(), make_task("running_sum", **config().task.options()), cold)
    for name, dropout in (("with", 0.5), ("without", 0.0)):
        shutil.copytree(start, tmp_path / name)
        settings = json.loads((start / "config.json").read_text()) | {"attention_dropout": dropout}
        (tmp_path / name / "config.json").write_text(json.dumps(settings))
        changed = config(checkpoint=str(tmp_path / name), sft_steps=0, gradient_checkpointing=True)
        train(changed, tmp_path / f"run {name}", cold_start_cache=cold)
    assert_same_run(tmp_path / "run with", tmp_path / "run without")


def test_checkpoints_are_not_overwritten_without_resume(tmp_path: Path, cold: Path) -> None:
    train(config(), tmp_path / "run", cold_start_cache=cold)
    with pytest.raises(ConfigError, match="add --resume"):
        train(config(), tmp_path / "run", cold_start_cache=cold)
    with pytest.raises(ConfigError, match="seed=0, this one has 1"):
        train(config(seed=1), tmp_path / "run", cold_start_cache=cold, resume=True)


def test_lost_log_lines_are_told_before_anything_is_cut(tmp_path: Path, cold: Path) -> None:
    with pytest.raises(Killed), killed_after(3):
        train(config(), tmp_path / "run", cold_start_cache=cold)
    (tmp_path / "run" / "updates.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"updates\.jsonl: 0 bytes.*lines are lost"):
        train(config(), tmp_path / "run", cold_start_cache=cold, resume=True)
