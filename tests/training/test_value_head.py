"""PPO's value head: it learns, it comes back from a checkpoint, and what its gradient reaches."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_rl.config import RunConfig
from moe_rl.metrics.instruments import value_metrics
from moe_rl.presets import preset
from moe_rl.run_folder.log import NoLog
from moe_rl.tasks import task_of
from moe_rl.training.cold_start import starting_policy
from moe_rl.training.crash import NonFinite
from moe_rl.training.debug_crash import debug_crash
from moe_rl.training.learner import Learner
from moe_rl.training.run import train
from moe_rl.training.trainer import Trainer


def tiny(**changes: Any) -> RunConfig:
    small = {"algorithm": "ppo", "steps": 2, "sft_steps": 150, "updates_per_rollout": 1}
    return preset("tiny").replace(**small | changes)


@pytest.fixture(scope="module")
def cold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cold")


def trainer_of(config: RunConfig, cold: Path) -> Trainer:
    task = task_of(config.task)
    return Trainer(config, starting_policy(config, task, cold), task, NoLog(cold))


def test_a_value_head_learns_to_foretell_the_rewards_of_a_rollout(cold: Path) -> None:
    # Where responses to one prompt differ their first tokens cannot tell the reward, and the loss
    # has a floor near the bound below. Cold samples are alike: over four seeds and three
    # arithmetics of one processor it fell to 0.07 to 0.25 of the first loss.
    options = {"value_coef": 1.0, "value_clip": 10.0}
    config = tiny(seed=1, temperature=0.25, attribution_every=0, loss_options=options)
    trainer = trainer_of(config, cold)
    experience, _ = trainer.experience(0)
    mask = experience.batch.response_mask
    rewards = torch.where(mask, experience.returns, 0.0).amax(1)  # type: ignore[arg-type]
    assert 0.1 < rewards.mean() < 0.9, "the test needs unequal rewards"
    returns = rewards[:, None].expand_as(mask)
    # No advantage: only the values learn.
    still = dataclasses.replace(
        experience, advantages=torch.zeros_like(experience.advantages), returns=returns
    )
    trainer.learner.set_learning_rate(5e-3)
    losses = [trainer.learner.update(still, 0, 0)["value/loss"] for _ in range(60)]
    values = trainer.learner.passes.old_pass(experience.batch, 0).values
    assert values is not None
    found = value_metrics(experience.batch, values, rewards)["value/explained_variance"]
    assert losses[-1] < losses[0] / 3
    # 0 before, when every value was the same: the value head tells responses apart.
    assert found > 0.5


def test_the_first_rollout_has_the_advantages_of_no_value(cold: Path) -> None:
    """So a step begins as REINFORCE with a mean as its baseline."""
    trainer = trainer_of(tiny(), cold)
    experience, metrics = trainer.experience(0)
    mask, returns = experience.batch.response_mask, experience.returns
    assert returns is not None and experience.old_values is not None
    assert not experience.old_values.any() and metrics["value/explained_variance"] == 0.0
    reward = returns[:, :1].expand_as(mask)[mask]
    assert torch.equal(returns[mask], reward) and metrics["reward"] == pytest.approx(
        returns[:, 0].mean().item()
    )
    expected = (reward - reward.mean()) / reward.std()
    torch.testing.assert_close(experience.advantages[mask], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reaches", [True, False])
def test_the_value_loss_trains_the_policy_only_where_it_is_let(reaches: bool, cold: Path) -> None:
    trainer = trainer_of(tiny(value_trains_policy=reaches), cold)
    learner = trainer.learner
    assert learner.value_head is not None
    with torch.no_grad():
        learner.value_head.weight.fill_(0.1)
    experience, _ = trainer.experience(0)
    still = dataclasses.replace(experience, advantages=torch.zeros_like(experience.advantages))
    learner.gradients(still, 0, 0)
    assert learner.value_head.weight.grad.abs().max() > 1e-4  # type: ignore[union-attr]
    largest = max(
        parameter.grad.abs().max().item()
        for parameter in trainer.policy.model.parameters()
        if parameter.grad is not None
    )
    assert largest > 1e-4 if reaches else largest == 0.0


def test_the_value_head_takes_its_share_of_the_learning_rate(cold: Path) -> None:
    moved = []
    for rate in (1.0, 10.0):
        trainer = trainer_of(tiny(value_rate=rate), cold)
        trainer.learner.set_learning_rate(5e-4)
        trainer.learner.update(trainer.experience(0)[0], 0, 0)
        bias = trainer.learner.value_head.bias  # type: ignore[union-attr]
        moved.append(bias.item())
    # AdamW's first step has the size of the learning rate.
    assert moved == [pytest.approx(5e-4, rel=1e-3), pytest.approx(5e-3, rel=1e-3)]


def test_the_engines_log_probs_come_with_the_trainers_values(cold: Path) -> None:
    """No pass is needed for those log-probs, but one is for the values."""
    trainer = trainer_of(tiny(old_logprobs="rollout"), cold)
    experience, _ = trainer.experience(0)
    assert torch.equal(experience.old_logprobs, experience.batch.rollout_logprobs)
    assert experience.old_values is not None
    assert trainer.learner.update(experience, 0, 0)["value/loss"] > 0.0


def test_a_crash_bundle_redoes_the_value_loss(
    tmp_path: Path, cold: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Learner.gradients

    def gradients(self: Learner, experience: Any, step: int, number: int) -> Any:
        if step == 1:
            experience.advantages[0] = -1.0
            experience.old_logprobs[0, 0] = -torch.inf
        return real(self, experience, step, number)

    monkeypatch.setattr(Learner, "gradients", gradients)
    with pytest.raises(NonFinite) as hit:
        train(tiny(value_rate=100.0), tmp_path / "run", cold_start_cache=cold)
    monkeypatch.undo()
    report = debug_crash(hit.value.crash.bundle)
    before = [
        json.loads(line)["value/loss"]
        for line in (tmp_path / "run" / "updates.jsonl").read_text().splitlines()
    ]
    assert report.metrics["value/loss"] == report.before["value/loss"] == before[1]
    assert before[1] != before[0]
