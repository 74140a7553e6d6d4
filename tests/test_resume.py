"""An interrupted run that goes on is bit for bit the run that was never interrupted."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moe_rl.config import ConfigError, RunConfig, preset
from moe_rl.run import train
from moe_rl.runlog import RunLog


class Killed(BaseException):
    """Stands in for a process that ends: nothing of ours catches it."""


def config(**changes: Any) -> RunConfig:
    every = {"steps": 2, "sft_steps": 300, "checkpoint_every": 1, "save_every": 2}
    return preset("tiny").replace(**every | changes).named()


@pytest.fixture(scope="module")
def cold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cold")


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    """Lines of a log without times: those alone may differ."""
    found = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{k: v for k, v in line.items() if "seconds" not in k} for line in found]


def assert_same_run(folder: Path, whole: Path) -> None:
    for name in ("steps.jsonl", "updates.jsonl"):
        assert lines(folder, name) == lines(whole, name)
    weights = [load_file(run / "policy_00002" / "model.safetensors") for run in (folder, whole)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    rewards = [
        json.loads((run / "summary.json").read_text())["final_reward"] for run in (folder, whole)
    ]
    assert rewards[0] == rewards[1]


def kill_after(monkeypatch: pytest.MonkeyPatch, updates: int) -> None:
    """Let the run die in the update after `updates` more are logged."""
    real, left = RunLog.update, [updates]

    def update(self: RunLog, values: Any) -> None:
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        real(self, values)

    monkeypatch.setattr(RunLog, "update", update)


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
    changes: dict[str, Any], tmp_path: Path, cold: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in each of its 8 updates, one after the other; 4 updates a rollout, 2 rollouts."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    train(config(**changes), whole, cold_start_cache=cold)
    assert all(line["grad_norm"] > 0 for line in lines(whole, "updates.jsonl")), "nothing to lose"
    deaths = 0
    while True:
        kill_after(monkeypatch, updates=1)
        try:
            train(config(**changes), run, cold_start_cache=cold, resume=True)
            break
        except Killed:
            deaths += 1
        finally:
            monkeypatch.undo()
    assert deaths == 7
    assert_same_run(run, whole)


@pytest.mark.parametrize("every", [3, 4, 5])
def test_lines_behind_the_checkpoint_are_written_anew(
    every: int, tmp_path: Path, cold: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    changed = config(checkpoint_every=every)
    train(changed, whole, cold_start_cache=cold)
    kill_after(monkeypatch, updates=7)
    with pytest.raises(Killed):
        train(changed, run, cold_start_cache=cold)
    monkeypatch.undo()
    with (run / "updates.jsonl").open("a") as file:
        file.write('{"step": 1, "upd')
    train(changed, run, cold_start_cache=cold, resume=True)
    assert_same_run(run, whole)


def test_a_damaged_newest_checkpoint_costs_updates_but_no_bits(
    tmp_path: Path, cold: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    train(config(), whole, cold_start_cache=cold)
    kill_after(monkeypatch, updates=6)
    with pytest.raises(Killed):
        train(config(), run, cold_start_cache=cold)
    monkeypatch.undo()
    newest = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()
    weights = newest / "policy" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    told: list[str] = []
    train(config(), run, cold_start_cache=cold, resume=True, on_damage=told.append)
    assert len(told) == 1 and str(weights) in told[0]
    assert_same_run(run, whole)


def test_checkpoints_are_not_overwritten_without_resume(tmp_path: Path, cold: Path) -> None:
    train(config(), tmp_path / "run", cold_start_cache=cold)
    with pytest.raises(ConfigError, match="add --resume"):
        train(config(), tmp_path / "run", cold_start_cache=cold)
    with pytest.raises(ConfigError, match="seed=0, this one has 1"):
        train(config(seed=1), tmp_path / "run", cold_start_cache=cold, resume=True)


def test_lost_log_lines_are_told_before_anything_is_cut(
    tmp_path: Path, cold: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_after(monkeypatch, updates=3)
    with pytest.raises(Killed):
        train(config(), tmp_path / "run", cold_start_cache=cold)
    monkeypatch.undo()
    (tmp_path / "run" / "updates.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"updates\.jsonl: 0 bytes.*lines are lost"):
        train(config(), tmp_path / "run", cold_start_cache=cold, resume=True)
