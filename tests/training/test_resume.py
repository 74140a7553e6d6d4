"""An interrupted run that is resumed is bit for bit the run that was never interrupted."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from runs import Killed, assert_same_run, killed_after, lines

from moe_rl.config import ConfigError, RunConfig
from moe_rl.presets import preset
from moe_rl.tasks import make_task
from moe_rl.training.cold_start import ensure_cold_start
from moe_rl.training.run import train


def config(**changes: Any) -> RunConfig:
    """3 rollout steps of 4 updates."""
    every = {"steps": 3, "sft_steps": 300, "checkpoint_every": 1, "save_every": 3}
    return preset("tiny").replace(**every | changes).named()


@pytest.fixture(scope="module")
def cold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cold")


@pytest.fixture(scope="module")
def whole(cold: Path) -> Path:
    """A run that nothing disturbs."""
    train(config(), cold.parent / "whole", cold_start_cache=cold)
    return cold.parent / "whole"


def killed_run(run: Path, cold: Path, updates: int = 9, **changes: Any) -> Path:
    """A run that died in its tenth update, after two steps; gives its newest checkpoint."""
    with pytest.raises(Killed), killed_after(updates):
        train(config(**changes), run, cold_start_cache=cold)
    return run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()


VARIANTS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "R2": {"routing_replay": "R2"},
    "R3 under noise": {"routing_replay": "R3", "router_noise": 0.3, "algorithm": "gspo"},
    "engine's log-probs": {"old_logprobs": "rollout"},
    "frozen router": {"freeze_router": True},
    "value head": {"algorithm": "ppo", "value_rate": 10.0},
    "no instruments": {"instruments": False},
    "rounded rollout": {"rollout_precision": "int4", "routing_replay": "R3"},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_killed_at_every_step_boundary_and_within_steps_the_run_is_bitwise_the_same(
    changes: dict[str, Any], tmp_path: Path, cold: Path
) -> None:
    assert_resumes(tmp_path, cold, **changes)


def test_a_bfloat16_run_resumes_from_its_float32_masters(tmp_path: Path, cold: Path) -> None:
    """At this rate hardly an update moves a bfloat16 weight: rounded masters would lose them."""
    start = ensure_cold_start(config(), make_task("running_sum", **config().task.options()), cold)
    changes = {"checkpoint": str(start), "sft_steps": 0, "dtype": "bfloat16"}
    assert_resumes(tmp_path, cold, learning_rate=1e-5, **changes)


def assert_resumes(tmp_path: Path, cold: Path, **changes: Any) -> None:
    """A run that is killed again and again ends as the one that nothing disturbs."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    train(config(**changes), whole, cold_start_cache=cold)
    learnt = {line["step"] for line in lines(whole, "updates.jsonl") if line["grad_norm"] > 0}
    assert learnt == {0, 1, 2}, "a step without gradients has nothing to lose"
    told: list[str] = []
    # Within step 0, which has no checkpoint; after step 0; after step 1 and two updates of step 2.
    for updates in (2, 4, 6):
        with pytest.raises(Killed), killed_after(updates):
            train(config(**changes), run, cold_start_cache=cold, resume=True, on_damage=told.append)
    train(config(**changes), run, cold_start_cache=cold, resume=True, on_damage=told.append)
    assert told == [f"{run}: no checkpoint to resume from; the run starts anew"]
    assert_same_run(run, whole)


def test_lines_behind_the_checkpoint_are_written_anew(
    tmp_path: Path, cold: Path, whole: Path
) -> None:
    """Of a step that was logged and not saved, of one under way, and of a line cut in two."""
    changed, run = config(checkpoint_every=2), tmp_path / "run"
    train(changed, tmp_path / "whole", cold_start_cache=cold)
    for step in (0, 2):

        def die(line: dict[str, Any], step: int = step) -> None:
            if line["step"] == step:
                raise Killed

        with pytest.raises(Killed):
            train(
                changed,
                run,
                cold_start_cache=cold,
                resume=True,
                on_step=die,
                on_damage=lambda _: None,
            )
    with (run / "updates.jsonl").open("a") as file:
        file.write('{"step": 2, "upd')
    train(changed, run, cold_start_cache=cold, resume=True)
    assert_same_run(run, tmp_path / "whole")


def test_a_damaged_newest_checkpoint_costs_steps_but_no_bits(
    tmp_path: Path, cold: Path, whole: Path
) -> None:
    run = tmp_path / "run"
    weights = killed_run(run, cold) / "policy" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    told: list[str] = []
    train(config(), run, cold_start_cache=cold, resume=True, on_damage=told.append)
    assert len(told) == 1 and str(weights) in told[0]
    assert_same_run(run, whole)


def test_a_complete_run_is_left_as_it_is(whole: Path, cold: Path) -> None:
    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in whole.rglob("*")}

    before = files()
    summary = train(config(), whole, cold_start_cache=cold)
    assert summary["steps"] == 3 and files() == before


def test_a_checkpoint_is_scored_by_the_reward_of_its_last_step(whole: Path) -> None:
    rewards = [line["reward"] for line in lines(whole, "steps.jsonl")]
    for path in (whole / "checkpoints").glob("0*"):
        manifest = json.loads((path / "manifest.json").read_text())
        assert manifest["reward"] == rewards[manifest["step"] - 1] > 0


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
    newest = killed_run(tmp_path / "run", cold)
    with pytest.raises(ConfigError, match=f"{newest.name}: a checkpoint of this run; add --resume"):
        train(config(), tmp_path / "run", cold_start_cache=cold)
    with pytest.raises(ConfigError, match="seed=0, this one has 1"):
        train(config(seed=1), tmp_path / "run", cold_start_cache=cold, resume=True)


def test_lost_log_lines_are_told(tmp_path: Path, cold: Path) -> None:
    killed_run(tmp_path / "run", cold)
    (tmp_path / "run" / "updates.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"updates\.jsonl: 0 lines.*lines are lost"):
        train(config(), tmp_path / "run", cold_start_cache=cold, resume=True)
