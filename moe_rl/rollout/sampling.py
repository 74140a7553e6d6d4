"""From a task to a rollout: draw prompts, sample a group of responses to each, score them."""

from collections.abc import Sequence

import torch

from moe_rl.policy import Policy
from moe_rl.rollout.batch import RolloutBatch
from moe_rl.rollout.cached import generate
from moe_rl.rollout.noise import RouterNoise
from moe_rl.seeding import uniforms
from moe_rl.tasks import Problem, Task


def sample_responses(
    policy: Policy,
    task: Task,
    problems: Sequence[Problem],
    *,
    seed: int,
    purpose: str,
    step: int = 0,
    prompts: Sequence[int] | None = None,
    group_size: int = 1,
    noise: RouterNoise | None = None,
    scores: bool = False,
) -> RolloutBatch:
    """Sample `group_size` responses to each problem.

    Which tokens are drawn is a pure function of the weights, the prompts and (seed, purpose, step,
    number of the prompt, number of the sample). `noise` and `scores` are those of `generate`.

    Args:
        prompts: numbers of the problems in a rollout of which these are a part. Default: from 0 on.
    """
    draws = uniforms(
        seed,
        purpose,
        step=step,
        prompts=range(len(problems)) if prompts is None else prompts,
        group_size=group_size,
        count=task.max_response_tokens,
    )
    texts = [problem.prompt for problem in problems]
    return generate(policy, texts, torch.from_numpy(draws), noise=noise, scores=scores)
