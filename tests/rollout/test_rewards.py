"""What a task's rewards may be, and what becomes of those that teach nothing."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_policy import rollout

from moe_rl.policy.policy import Policy
from moe_rl.presets import preset
from moe_rl.rollout.rewards import score_responses
from moe_rl.run_folder.log import RunLog
from moe_rl.tasks import RunningSum
from moe_rl.training.trainer import Trainer, _rollout_metrics


class Judge(RunningSum):
    """A running sum whose rewards are whatever a test wants."""

    given: Any = 1.0

    def reward(
        self, prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]
    ) -> Any:
        given = self.given
        return given(prompts) if callable(given) else [given] * len(completions)


def judge(given: Any) -> Judge:
    task = Judge(digits=2)
    object.__setattr__(task, "given", given)
    return task


def trainer(policy: Policy, folder: Path, given: Any, **changes: Any) -> Trainer:
    small = {"prompts_per_rollout": 4, "group_size": 4, "updates_per_rollout": 2, "steps": 2}
    config = preset("tiny").replace(**small | changes).named()
    return Trainer(config, policy, judge(given), RunLog(folder / "run", config))


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (math.nan, "gave the reward nan to response 2 of prompt 1"),
        (-math.inf, "gave the reward -inf to response 2 of prompt 1"),
        (1e300, r"gave the reward 1e\+300 to response 2"),  # beyond float32
        (None, "gave the reward None to response 2"),
        ([1.0, 2.0], r"gave the reward \[1.0, 2.0\] to response 2"),
    ],
)
def test_a_reward_that_is_no_finite_number_stops_the_run_before_an_update(
    bad: Any, words: str, policy: Policy, tmp_path: Path
) -> None:
    def given(prompts: Sequence[str]) -> list[Any]:
        return [bad if i == 6 else 0.0 for i in range(len(prompts))]

    made = trainer(policy, tmp_path, given)
    before = [p.clone() for p in policy.model.parameters()]
    with pytest.raises(ValueError, match=rf"rollout step 0: task 'running_sum' {words}.*1 of 16"):
        made.run()
    assert all(torch.equal(a, b) for a, b in zip(before, policy.model.parameters(), strict=True))
    assert (tmp_path / "run" / "updates.jsonl").read_text() == ""


def test_a_bad_reward_is_shown_with_its_prompt_and_response(policy: Policy) -> None:
    task = judge(math.nan)
    problems = task.prompts(np.random.default_rng(0), 2)
    ids = rollout(policy, [problem.prompt for problem in problems]).response_ids
    with pytest.raises(ValueError) as caught:
        score_responses(policy, task, problems, ids)
    text = policy.decode(ids)[0]
    assert f"of prompt 0, {text!r} to {problems[0].prompt!r} (6 of 6" in str(caught.value)


def test_rewards_of_every_numeric_kind_are_taken(policy: Policy) -> None:
    kinds = [True, 1, 1.0, np.float32(1.0), np.bool_(True), torch.tensor(1.0)]
    task = judge(lambda prompts: iter(kinds))
    problems = task.prompts(np.random.default_rng(0), 2)
    ids = torch.full((6, 1), policy.eos_id)
    assert torch.equal(score_responses(policy, task, problems, ids), torch.ones(2, 3))


def test_another_number_of_rewards_is_refused(policy: Policy, tmp_path: Path) -> None:
    made = trainer(policy, tmp_path, lambda prompts: [1.0])
    with pytest.raises(ValueError, match=r"step 0: .* returned 1 rewards for 16 responses"):
        made.run()


@pytest.mark.parametrize("algorithm", ["grpo", "gspo", "gspo_token"])
def test_equal_rewards_are_no_signal(algorithm: str, policy: Policy, tmp_path: Path) -> None:
    """Loss and gradient are 0, and a first update leaves every weight as it is."""
    made = trainer(policy, tmp_path, 0.7, algorithm=algorithm, group_size=8)
    before = [p.clone() for p in policy.model.parameters()]
    made.run()
    assert all(torch.equal(a, b) for a, b in zip(before, policy.model.parameters(), strict=True))
    updates = lines(tmp_path, "updates.jsonl")
    assert len(updates) == 4
    assert all(u["loss"] == 0.0 and u["grad_norm"] == 0.0 and not u["skipped"] for u in updates)
    steps = lines(tmp_path, "steps.jsonl")
    assert all(s["zero_std_groups"] == 1.0 and s["reward_std"] < 1e-6 for s in steps)


@pytest.mark.parametrize("reward", [0.1, 0.3, 0.7, 0.9])
def test_equal_rewards_are_counted_as_equal_though_their_deviation_is_rounded(
    reward: float,
) -> None:
    groups = [torch.full((1, size), reward) for size in range(2, 17)]
    mask = torch.ones(1, 1, dtype=torch.bool)

    def zero_std_groups(rewards: torch.Tensor) -> float:
        found = _rollout_metrics(rewards.flatten(), mask, mask, rewards.shape[1])
        return float(found["zero_std_groups"])

    assert any(group.std(dim=1) > 0 for group in groups), "the test needs one that is rounded"
    assert all(zero_std_groups(group) == 1.0 for group in groups)
    unequal = torch.tensor([[reward, reward], [reward, 0.0]])
    assert zero_std_groups(unequal) == 0.5


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / name).read_text().splitlines()]


@pytest.mark.parametrize("old", ["trainer", "rollout"])
@pytest.mark.parametrize("algorithm", ["grpo", "gspo", "gspo_token"])
def test_responses_that_end_at_once_are_trained_on(
    algorithm: str, old: str, policy: Policy, tmp_path: Path
) -> None:
    """Each is one token, the end of sequence; nothing in the run is undefined."""
    ends_at_once(policy)

    def given(prompts: Sequence[str]) -> list[float]:
        return [float(i % 2) for i in range(len(prompts))]

    made = trainer(policy, tmp_path, given, algorithm=algorithm, old_logprobs=old)
    experience, _ = made.experience(0)
    assert experience.batch.response_ids.shape == (16, 1)
    assert (experience.batch.response_ids == policy.eos_id).all()
    assert policy.decode(experience.batch.response_ids) == [""] * 16
    made.run()
    for line in lines(tmp_path, "steps.jsonl") + lines(tmp_path, "updates.jsonl"):
        for name, value in line.items():
            values = value if isinstance(value, list) else [value]
            assert all(isinstance(v, int | float) and math.isfinite(v) for v in values), name
    assert all(s["response_length"] == 1.0 for s in lines(tmp_path, "steps.jsonl"))


def ends_at_once(policy: Policy) -> None:
    """Make the end of sequence the only token that is ever sampled."""
    head = policy.model.get_output_embeddings()

    def only_the_end(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        bias = torch.full((output.shape[-1],), -1e4)
        bias[policy.eos_id] = 0.0
        return output + bias

    head.register_forward_hook(only_the_end)
