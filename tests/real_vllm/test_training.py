"""Training with the real vLLM from end to end."""

import json
from pathlib import Path
from typing import Any

import pytest

from moe_rl.commands.cli import main
from moe_rl.config import RunConfig
from moe_rl.presets import preset
from moe_rl.training.run import train

UPDATES = 2
_SMALL: dict[str, Any] = {
    "num_attention_heads": 1,
    "prompts_per_rollout": 4,
    "group_size": 4,
    "updates_per_rollout": UPDATES,
    "learning_rate": 2e-3,
    "warmup_steps": 0,
    "sft_steps": 20,
}


@pytest.fixture(scope="module")
def cold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cold")


def small(**changes: Any) -> RunConfig:
    return preset("tiny").replace(engine="vllm", steps=1, **_SMALL | changes)


def run(config: RunConfig, folder: Path, cold: Path) -> list[list[dict[str, Any]]]:
    """The lines of the rollout steps and of the updates."""
    train(config, folder, cold_start_cache=cold)
    return [read(folder / name) for name in ("steps.jsonl", "updates.jsonl")]


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_an_engine_equal_to_the_trainer_has_no_mismatch_and_makes_r3_equal_r2(
    tmp_path: Path, cold: Path
) -> None:
    steps, r2 = run(small(routing_replay="R2", temperature=0.7), tmp_path / "r2", cold)
    _, r3 = run(small(routing_replay="R3", temperature=0.7), tmp_path / "r3", cold)
    assert steps[0]["mismatch/churn"] == 0 and steps[0]["mismatch/kl_k3"] < 1e-8
    assert len(r2) == UPDATES
    for ours, theirs in zip(r2, r3, strict=True):
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


def test_log_probs_of_vllm_are_old_log_probs_with_every_instrument(
    tmp_path: Path, cold: Path
) -> None:
    steps, trainer = run(small(), tmp_path / "trainer", cold)
    also, engine = run(small(old_logprobs="rollout"), tmp_path / "engine", cold)
    for ours, theirs in zip(trainer, engine, strict=True):
        for name in ("grad_norm", "ratio/token_var", "routing/churn", "routing/shift"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-2, abs=1e-6), name
    for name in ("routing/margin", "routing/entropy", "entropy"):
        assert steps[0][name] == pytest.approx(also[0][name], rel=1e-4), name


def test_the_command_trains_with_a_bf16_engine_under_replay(tmp_path: Path, cold: Path) -> None:
    folder = tmp_path / "run"
    options = {"engine": "vllm", "rollout_precision": "bf16", "routing_replay": "R3", "steps": 3}
    words = [
        word
        for name, value in (_SMALL | options).items()
        for word in ("--" + name.replace("_", "-"), str(value))
    ]
    command = ["train", "--preset", "tiny", "--out", str(folder), *words]
    assert main([*command, "--cold-start-cache", str(cold)]) == 0
    steps, updates = read(folder / "steps.jsonl"), read(folder / "updates.jsonl")
    assert len(steps) == 3
    for step in steps:
        assert 0 < step["mismatch/kl_k3"] < 1e-2
    for update in updates[::UPDATES]:  # the old pass and the first update replay one record
        assert update["ratio/token_var"] < 1e-8
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["rollout_numerics"] == "weights and arithmetic bfloat16"
