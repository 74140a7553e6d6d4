"""From a task to a rollout: draw prompts, sample a group of responses to each, score them."""

from collections.abc import Sequence

from moe_rl.batch import RolloutBatch
from moe_rl.policy.policy import Policy
from moe_rl.rollout.engine import CachedEngine, Engine, Request
from moe_rl.rollout.router_noise import RouterNoise
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
    engine: Engine | None = None,
) -> RolloutBatch:
    """Sample `group_size` responses to each problem.

    With the default engine, which tokens are drawn is a pure function of the weights, the prompts
    and (seed, purpose, step, number of the prompt, number of the sample). `noise` and `scores` are
    those of `generate`.

    Args:
        prompts: numbers of the problems in a rollout of which these are a part. Default: from 0 on.
        engine: of the same policy, in place of the policy itself.
    """
    request = Request(
        prompts=[problem.prompt for problem in problems],
        numbers=range(len(problems)) if prompts is None else prompts,
        seed=seed,
        purpose=purpose,
        step=step,
        group_size=group_size,
        max_tokens=task.max_response_tokens,
        noise=noise,
        scores=scores,
    )
    return (engine or CachedEngine(policy)).sample(request)
