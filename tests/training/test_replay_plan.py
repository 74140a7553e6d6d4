"""TRR in training: the engine's ids and gate weights in the old pass and in the updates."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_rl.batch import Experience
from moe_rl.config import RunConfig
from moe_rl.presets import preset
from moe_rl.routing import find_routers
from moe_rl.run_folder.log import NoLog
from moe_rl.tasks import task_of
from moe_rl.training.cold_start import starting_policy
from moe_rl.training.run import train
from moe_rl.training.trainer import Trainer


def tiny(replay: str, **changes: Any) -> RunConfig:
    small = {"steps": 1, "prompts_per_rollout": 4, "group_size": 4, "learning_rate": 2e-2}
    return preset("tiny").replace(routing_replay=replay, **(small | changes))


@pytest.fixture(scope="module")
def cold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cold")


def trainer_of(config: RunConfig, cold: Path) -> Trainer:
    task = task_of(config.task)
    return Trainer(config, starting_policy(config, task, cold), task, NoLog(cold))


def first_update(config: RunConfig, cold: Path) -> tuple[Trainer, Experience, Tensor, float]:
    """The trainer with the first update's gradients, and that update's log-probs and loss."""
    trainer = trainer_of(config.replace(updates_per_rollout=1), cold)
    experience, _ = trainer.experience(0)
    assert experience.advantages.any(), "without them the gradient of everything is 0"
    (passed,) = trainer.learner.gradients(experience, step=0, update=0)
    return trainer, experience, passed.output.logprobs.detach(), passed.loss


def last_line(config: RunConfig, folder: Path, cold: Path) -> dict[str, Any]:
    train(config, folder, cold_start_cache=cold)
    return json.loads((folder / "updates.jsonl").read_text().splitlines()[-1])


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_with_the_engines_weights_trr_is_r3_in_value_until_weights_move(
    noise: float, cold: Path
) -> None:
    (_, r3, r3_new, r3_loss), (_, trr, trr_new, trr_loss) = (
        first_update(tiny(replay, router_noise=noise), cold) for replay in ("R3", "TRR")
    )
    mask = trr.batch.response_mask
    assert r3.batch.gate_weights is None
    weights = trr.batch.gate_weights
    assert weights is not None and weights.shape == trr.batch.routed_experts.shape
    assert weights[:, :-1].isfinite().all() and weights[:, -1].isnan().all()
    for ours, theirs in (
        (trr.old_logprobs, r3.old_logprobs),
        (trr.old_logprobs, trr.batch.rollout_logprobs),
        (trr_new, r3_new),
        (trr_new, trr.old_logprobs),
    ):
        assert torch.allclose(ours[mask], theirs[mask], atol=1e-5)
    assert trr_loss == pytest.approx(r3_loss, abs=1e-5)


def test_the_old_pass_and_the_updates_count_with_the_engines_weights(cold: Path) -> None:
    trainer = trainer_of(tiny("TRR", updates_per_rollout=1), cold)
    experience, _ = trainer.experience(0)
    batch, mask = experience.batch, experience.batch.response_mask
    other = dataclasses.replace(batch, gate_weights=batch.gate_weights.flip(-1))
    old = trainer.learner.passes.old_pass(other, 0).logprobs
    changed = dataclasses.replace(experience, batch=other)
    new = trainer.learner.gradients(changed, step=0, update=0)[0].output.logprobs
    assert (old - experience.old_logprobs)[mask].abs().max() > 1e-3
    assert torch.allclose(new[mask], old[mask], atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_under_trr_routers_get_no_gradient_and_all_else_does(
    checkpointing: bool, cold: Path
) -> None:
    for replay in ("R3", "TRR"):
        config = tiny(replay, gradient_checkpointing=checkpointing)
        trainer, *_ = first_update(config, cold)
        model = trainer.policy.model
        routers = [tap.module.weight.grad for tap in find_routers(model)]
        assert all(grad.any() == (replay == "R3") for grad in routers)
        experts = [p.grad for name, p in model.named_parameters() if ".experts." in name]
        assert experts and all(grad.any() for grad in experts)


def test_under_trr_gradient_checkpointing_gives_the_same_gradient(cold: Path) -> None:
    plain, saving = (
        first_update(tiny("TRR", gradient_checkpointing=on), cold)[0].policy.model
        for on in (False, True)
    )
    named = dict(saving.named_parameters())
    for name, p in plain.named_parameters():
        assert torch.allclose(p.grad, named[name].grad, rtol=1e-3, atol=1e-6), name


def test_the_gate_part_is_there_once_weights_have_moved(tmp_path: Path, cold: Path) -> None:
    still = last_line(tiny("TRR", updates_per_rollout=1, router_noise=0.5), tmp_path / "a", cold)
    assert still["ratio/gate_part"] < 1e-10
    assert still["rollout_ratio/k3_ids"] < 1e-10 and still["rollout_ratio/k3_weights"] < 1e-10
    assert still["rollout_ratio/k3_live"] > 1e-4
    assert still["ratio/routing_part"] > 1e-4 and still["ratio/weight_part"] < 1e-10
    moved = last_line(tiny("TRR"), tmp_path / "b", cold)
    assert moved["ratio/gate_part"] > 1e-8
    assert moved["rollout_ratio/k3_ids"] != moved["rollout_ratio/k3_weights"] > 0.0
    assert "ratio/gate_part" not in last_line(tiny("R3"), tmp_path / "c", cold)


def test_sub_batches_and_padding_carry_the_gate_weights(cold: Path) -> None:
    batch = trainer_of(tiny("TRR"), cold).experience(0)[0].batch
    assert batch.gate_weights is not None and batch.routed_experts is not None
    part = batch.select_prompts(slice(1, 3)).padded(7, 9, pad_id=0)
    assert part.gate_weights is not None and part.routed_experts is not None
    prompt, response = batch.prompt_ids.shape[1], batch.response_ids.shape[1]
    inside = slice(7 - prompt, 7 + response)
    assert torch.equal(part.gate_weights[:, inside][:, :-1], batch.gate_weights[4:12, :-1])
    recorded = (part.routed_experts >= 0).all(-1)
    assert torch.equal(part.gate_weights.isfinite().all(-1), recorded)


@pytest.mark.parametrize("replay", ["disabled", "R2", "R3"])
def test_coverage_is_the_share_of_response_pairs_with_a_record(replay: str, cold: Path) -> None:
    """Without instruments too; rows of -1 are not replayed, those of the prompt do not count."""
    config = tiny(replay, updates_per_rollout=1, instruments=False, prompts_per_forward=1)
    learner = trainer_of(config, cold).learner
    experience, _ = trainer_of(config, cold).experience(0)
    line = learner.update(experience, 0, 0)
    if replay == "disabled":
        assert "replay/coverage" not in line
        return
    assert line["replay/coverage"] == 1.0
    mask, prompt = experience.batch.response_mask, experience.batch.prompt_ids.shape[1]
    lost = experience.replay.clone()
    lost[:, : prompt - 1] = -1  # of the prompt alone
    lost[0, prompt, 1] = -1
    line = learner.update(dataclasses.replace(experience, replay=lost), 0, 0)
    pairs = int(mask.sum()) * lost.shape[2]
    assert line["replay/coverage"] == pytest.approx(1 - 1 / pairs, abs=1e-9)


@pytest.mark.parametrize(
    ("replay", "changes", "split"),
    [
        ("disabled", {}, True),
        ("disabled", {"old_passes": 2}, False),
        ("disabled", {"old_logprobs": "rollout"}, True),
        ("R2", {}, True),
        ("R2", {"old_logprobs": "rollout"}, False),
        ("R3", {}, True),
        ("R3", {"old_passes": 2}, False),
        ("R3", {"old_logprobs": "rollout"}, True),
    ],
)
def test_a_log_ratio_is_split_only_where_old_log_probs_have_the_routes_that_are_replayed(
    replay: str, changes: dict[str, Any], split: bool, cold: Path, tmp_path: Path
) -> None:
    """There weights contribute nothing until they move; elsewhere noise would count as theirs."""
    config = tiny(replay, router_noise=0.5, updates_per_rollout=1, **changes)
    line = last_line(config, tmp_path / "run", cold)
    assert ("ratio/weight_part" in line) == split
    if split:
        assert line["ratio/weight_part"] == pytest.approx(0, abs=1e-8)
        assert line["ratio/routing_part"] > 1e-5
