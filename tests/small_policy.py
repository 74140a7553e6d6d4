"""A small policy whose routes are no near ties, and a rollout of it: what several tests read."""

import torch

from moe_rl.batch import RolloutBatch
from moe_rl.policy.build import build_policy
from moe_rl.policy.policy import Policy
from moe_rl.presets import preset
from moe_rl.rollout.cached import generate

ALPHABET = "0123456789="
PROMPTS = ["1234=", "9876=", "5=", "31="]


def small_policy() -> Policy:
    return widen(build_policy(preset("tiny").model, ALPHABET, seed=3))


def widen(policy: Policy) -> Policy:
    """Make its weights so large that tokens differ and routes are not all near ties."""
    for parameter in policy.model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(4.0)
    return policy


def rollout(policy: Policy, prompts: list[str], group: int = 3, length: int = 6) -> RolloutBatch:
    rng = torch.Generator().manual_seed(0)
    uniforms = torch.rand(len(prompts) * group, length, generator=rng, dtype=torch.float64)
    return generate(policy, prompts, uniforms, router_logits=True)
