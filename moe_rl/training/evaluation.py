"""Held-out evaluation, as papers score a policy: many samples of each prompt, pass@1 and pass@k."""

from collections.abc import Sequence
from math import comb
from typing import Any

import torch
from torch import Tensor

from moe_rl.config import RunConfig
from moe_rl.policy.policy import Policy
from moe_rl.rollout.cached import CachedEngine
from moe_rl.rollout.request import Request
from moe_rl.rollout.rewards import score_responses
from moe_rl.runtime.ranks import Ranks
from moe_rl.runtime.seeding import generator
from moe_rl.tasks import Problem, Task

_SEED = 0  # of prompts and samples: the same for all runs, so that arms are compared on equal ones


@torch.no_grad()
def evaluate_policy(
    policy: Policy, task: Task, config: RunConfig, step: int, ranks: Ranks
) -> dict[str, float]:
    """Held-out metrics: `pass_at_1`, `pass_at_k` and `evaluation_reward`; docs/metrics.md.

    The policy itself samples, at its temperature and without router noise, whatever the rollout
    engine. A response is right if its reward is 1 or more. Each rank takes its share of the
    prompts, and all get the means.

    Raises:
        FloatingPointError: the policy's logits are NaN or inf, on any rank.
    """
    problems = held_out_problems(task, config.evaluation_prompts)
    samples, k = config.evaluation_samples, config.evaluation_k
    # As many sequences at a time as in a rollout: that many are known to fit.
    at_once = max(1, config.prompts_per_rollout * config.group_size // (samples * ranks.size))
    mine = range(ranks.rank, len(problems), ranks.size)
    sums = [0.0, 0.0, 0.0]
    with ranks.finite_together():
        for numbers in (mine[i : i + at_once] for i in range(0, len(mine), at_once)):
            rewards = sample_rewards(
                policy,
                task,
                [problems[number] for number in numbers],
                numbers=numbers,
                seed=_SEED,
                purpose="evaluation_samples",
                step=step,
                group_size=samples,
            )
            right = (rewards >= 1).sum(1).tolist()
            found = [[pass_at_k(samples, count, n) for count in right] for n in (1, k)]
            found.append(rewards.mean(1).tolist())
            sums = [total + sum(values) for total, values in zip(sums, found, strict=True)]
    names = ("pass_at_1", "pass_at_k", "evaluation_reward")
    return {
        name: ranks.total(value) / len(problems) for name, value in zip(names, sums, strict=True)
    }


def held_out_problems(task: Task, count: int) -> list[Problem]:
    """The problems of every evaluation: `count` of the held-out rows, or all where there are fewer.

    A task without held-out rows draws them, apart from those of training; with few problems it may
    draw the same ones.
    """
    rows = task.held_out()
    if not rows:
        return [task.prompts(generator(_SEED, "evaluation", prompt=n), 1)[0] for n in range(count)]
    order = generator(_SEED, "evaluation").permutation(len(rows))
    return [rows[i] for i in sorted(order[:count])]


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Unbiased estimate of the probability that one of k samples is right: 1 - C(n-c, k) / C(n, k).

    Source: arXiv 2107.03374 (Codex), eq. 1.

    Args:
        samples: n, taken of one prompt.
        right: c, of those.
        k: at most n.
    """
    return 1.0 - comb(samples - right, k) / comb(samples, k)


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
    return score_responses(
        policy, task, problems, batch.response_ids, step=request.step, numbers=numbers
    )
