"""From sampled ids to rewards: the text of each response goes to the task's reward function."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_rl.policy.policy import Policy
from moe_rl.tasks import Problem, Task


def score(
    policy: Policy,
    task: Task,
    problems: Sequence[Problem],
    response_ids: Tensor,
    *,
    step: int | None = None,
    numbers: Sequence[int] | None = None,
) -> Tensor:
    """Rewards of the G responses to each of P problems: float32 [P, G].

    Args:
        policy: whose tokenizer reads the responses.
        task: whose reward function judges them.
        problems: P problems.
        response_ids: int64 [P * G, T].
        step: rollout step, for messages.
        numbers: of the P prompts within it, likewise; None: from 0.

    Raises:
        ValueError: the reward function returned another number of rewards than responses, or one
            that is no finite number; names step, prompt and response.
    """
    group = response_ids.shape[0] // len(problems)
    prompts = [problem.prompt for problem in problems for _ in range(group)]
    columns = {
        key: [problem.columns[key] for problem in problems for _ in range(group)]
        for key in problems[0].columns
    }
    responses = policy.decode(response_ids)
    values = list(task.reward(prompts, responses, **columns))
    where = "" if step is None else f"rollout step {step}: "
    if len(values) != len(prompts):
        raise ValueError(
            f"{where}task {task.name!r} returned {len(values)} rewards for {len(prompts)} responses"
        )
    exact = torch.tensor([_number(value) for value in values], dtype=torch.float64)
    rewards = exact.float()  # beyond its range: infinite
    bad = (~rewards.isfinite()).nonzero().flatten().tolist()
    if bad:
        prompt, sample = divmod(bad[0], group)
        raise ValueError(
            f"{where}task {task.name!r} gave the reward {values[bad[0]]!r:.60} to response "
            f"{sample} of prompt {numbers[prompt] if numbers else prompt}, "
            f"{responses[bad[0]]!r:.60} to {prompts[bad[0]]!r:.60} "
            f"({len(bad)} of {len(values)} are no finite numbers); mend its reward function"
        )
    return rewards.view(len(problems), group)


def _number(reward: Any) -> float:
    """A reward as a float, NaN for what is no number."""
    if isinstance(reward, str | bytes):  # float() would read a number in it
        return float("nan")
    try:
        return float(reward)
    except (TypeError, ValueError, OverflowError):
        return float("nan")
