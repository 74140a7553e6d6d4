"""Float32 master weights: small updates of bfloat16 weights add up, and files keep them."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from moe_rl.presets import preset
from moe_rl.run_folder.log import NoLog
from moe_rl.tasks import task_of
from moe_rl.training.cold_start import starting_policy
from moe_rl.training.master_weights import MasterWeights
from moe_rl.training.state import collect_policy
from moe_rl.training.trainer import Trainer


def test_updates_below_a_rounding_step_add_up() -> None:
    """600 steps of 1e-5 are 0.006, 0.75 of a bfloat16 step below 1: none of them shows alone."""
    own = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    weights = MasterWeights([own])
    optimizer = torch.optim.SGD(weights.masters, lr=1e-5)
    for _ in range(600):
        own.grad = torch.ones_like(own)
        weights.take_gradients()
        assert own.grad is None
        before = weights.copies()
        weights.step(optimizer)
        assert weights.count_moved(before) == 8
    torch.testing.assert_close(weights.masters[0].detach(), torch.full((8,), 0.994))
    assert torch.equal(own, torch.full((8,), 0.994).bfloat16()) and own[0] < 1


def test_float32_weights_are_their_own_masters_and_frozen_ones_have_none() -> None:
    own, frozen = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3), requires_grad=False)
    weights = MasterWeights([own, frozen])
    assert weights.masters == [own] and not weights.has_copies
    own.grad = torch.tensor([0.0, 0.0, 1.0])
    weights.take_gradients()
    before = weights.copies()
    weights.step(torch.optim.SGD(weights.masters, lr=0.1))
    assert weights.count_moved(before) == 1


def test_tied_weights_are_saved_as_one() -> None:
    own = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    buffer = torch.ones(2)
    exact = MasterWeights([own]).exact({"embed": own, "head": own, "buffer": buffer})
    assert exact["embed"].dtype == torch.float32
    assert exact["embed"].data_ptr() == exact["head"].data_ptr()
    assert torch.equal(exact["buffer"], buffer)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_small_learning_rate_moves_nearly_all_weights(dtype: str, tmp_path: Path) -> None:
    """At 1e-6, where one update alone moves hardly any bfloat16 weight; and what is saved too."""
    config = preset("tiny").replace(dtype=dtype, sft_steps=0)
    task = task_of(config.task)
    policy = starting_policy(config, task, tmp_path / "cold")
    trainer = Trainer(config, policy, task, NoLog(tmp_path))
    experience, _ = trainer.experience(0)
    # An untrained policy's rewards are all 0, and there would be nothing to learn.
    drawn = torch.randn(len(experience.advantages), generator=torch.Generator().manual_seed(0))
    experience = dataclasses.replace(experience, advantages=drawn)
    trainer.learner.set_learning_rate(1e-6)
    collect_policy(trainer.learner)(tmp_path / "before")
    for update in range(config.updates_per_rollout):
        metrics = trainer.learner.update(experience, 0, update)
        assert 0.8 < metrics["weights/moved_share"] <= 1
    collect_policy(trainer.learner)(tmp_path / "after")
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("before", "after"))
    moved = sum(int((before[key] != after[key]).sum()) for key in before)
    assert moved > 0.8 * sum(value.numel() for value in before.values())
    again = starting_policy(config.replace(checkpoint=str(tmp_path / "after")), task, tmp_path)
    for name, weight in policy.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], weight), name
    assert again.model.config.dtype == getattr(torch, dtype)
