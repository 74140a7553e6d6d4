"""From sampled ids to rewards: the text of each response goes to the task's reward function."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_rl.policy.policy import Policy
from moe_rl.tasks import Problem, Task


def score_responses(
    policy: Policy,
    task: Task,
    problems: Sequence[Problem],
    response_ids: Tensor,
    *,
    step: int = 0,
    numbers: Sequence[int] | None = None,
) -> Tensor:
    """Rewards of the G responses to each of P problems: int64 ids [P * G, T] -> float32 [P, G].

    Errors name the rollout `step` and the prompt by its place in `numbers` (None: from 0).

    Raises:
        ValueError: the reward function returned another number of rewards than responses, or one
            that is no finite number; names step, prompt and response.
    """
    group = response_ids.shape[0] // len(problems)
    prompts = [problem.prompt for problem in problems for _ in range(group)]
    columns: dict[str, list[Any]] = {
        key: [problem.columns[key] for problem in problems for _ in range(group)]
        for key in problems[0].columns
    }
    responses = policy.decode(response_ids)
    columns |= {"completion_ids": policy.until_end(response_ids)}  # as TRL's reward functions get
    values = list(task.reward(prompts, responses, **columns))
    where = f"rollout step {step}: task {task.name!r}"
    if len(values) != len(prompts):
        raise ValueError(f"{where} returned {len(values)} rewards for {len(prompts)} responses")
    # Tasks may be judges in float64; what exceeds float32 becomes infinite, and is refused.
    rewards = torch.tensor([_to_float(value) for value in values], dtype=torch.float64).float()
    bad = (~rewards.isfinite()).nonzero().flatten().tolist()
    if bad:
        prompt, sample = divmod(bad[0], group)
        raise ValueError(
            f"{where} gave the reward {values[bad[0]]!r:.60} to response {sample} of prompt "
            f"{numbers[prompt] if numbers else prompt}, {responses[bad[0]]!r:.60} to "
            f"{prompts[bad[0]]!r:.60} ({len(bad)} of {len(values)} are no finite numbers); fix its "
            "reward function"
        )
    return rewards.view(len(problems), group)


def _to_float(reward: Any) -> float:
    """A reward as a float, NaN for None and whatever else is no number."""
    try:
        return float(reward)
    except (TypeError, ValueError):
        return float("nan")
