"""From sampled ids to rewards: the text of each response goes to the task's reward function."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_rl.policy import Policy
from moe_rl.tasks import Problem, Task


def score(policy: Policy, task: Task, problems: Sequence[Problem], response_ids: Tensor) -> Tensor:
    """Rewards of the G responses to each of P problems: float32 [P, G].

    Raises:
        ValueError: the reward function returned another number of rewards than responses.
    """
    group = response_ids.shape[0] // len(problems)
    prompts = [problem.prompt for problem in problems for _ in range(group)]
    columns = {
        key: [problem.columns[key] for problem in problems for _ in range(group)]
        for key in problems[0].columns
    }
    values = task.reward(prompts, policy.decode(response_ids), **columns)
    if len(values) != len(prompts):
        raise ValueError(
            f"task {task.name!r} returned {len(values)} rewards for {len(prompts)} responses"
        )
    return torch.tensor(values, dtype=torch.float32).view(len(problems), group)
