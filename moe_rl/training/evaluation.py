"""Held-out pass@1, as papers score a policy: the mean over many samples of each prompt."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_rl.policy.policy import Policy
from moe_rl.rollout.cached import CachedEngine
from moe_rl.rollout.request import Request
from moe_rl.rollout.rewards import score_responses
from moe_rl.runtime.ranks import Ranks
from moe_rl.runtime.seeding import generator
from moe_rl.tasks import Problem, Task

PROMPTS, SAMPLES = 64, 32
_SEED = 0  # of prompts and samples: the same for all runs, so that arms are compared on equal ones


@torch.no_grad()
def pass_at_1(policy: Policy, task: Task, step: int, ranks: Ranks) -> float:
    """Mean reward of SAMPLES samples to each of PROMPTS prompts, without router noise.

    The policy itself samples, at its temperature, whatever the rollout engine. The prompts are
    drawn apart from those of training; a task with few problems may draw the same ones. Each rank
    takes its share of the prompts, and all get the mean.
    """
    numbers = range(ranks.rank, PROMPTS, ranks.size)
    problems = [task.prompts(generator(_SEED, "evaluation", prompt=n), 1)[0] for n in numbers]
    rewards = sample_rewards(
        policy,
        task,
        problems,
        numbers=numbers,
        seed=_SEED,
        purpose="evaluation_samples",
        step=step,
        group_size=SAMPLES,
    )
    return ranks.total(float(rewards.sum())) / (PROMPTS * SAMPLES)


def sample_rewards(
    policy: Policy, task: Task, problems: Sequence[Problem], *, numbers: Sequence[int], **draws: Any
) -> Tensor:
    """Rewards float32 [P, G] of samples of the policy itself; `draws` are fields of `Request`."""
    request = Request(
        prompts=[problem.prompt for problem in problems],
        numbers=numbers,
        max_tokens=task.max_response_tokens,
        **draws,
    )
    batch = CachedEngine(policy).sample(request)
    return score_responses(policy, task, problems, batch.response_ids, numbers=numbers)
