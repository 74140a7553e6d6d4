"""A small policy whose routes are no near ties, and a rollout of it: what several tests read."""

import torch

from moe_rl.config import preset
from moe_rl.policy import Policy, build_policy
from moe_rl.rollout.batch import RolloutBatch
from moe_rl.rollout.cached import generate

ALPHABET = "0123456789="
PROMPTS = ["1234=", "9876=", "5=", "31="]


def small_policy() -> Policy:
    config = preset("tiny").model
    made = build_policy(config, ALPHABET, seed=3)
    for parameter in made.model.parameters():
        if parameter.ndim > 1:  # large enough that tokens differ and routes are not all near ties
            parameter.data.mul_(4.0)
    return made


def rollout(policy: Policy, prompts: list[str], group: int = 3, length: int = 6) -> RolloutBatch:
    rng = torch.Generator().manual_seed(0)
    uniforms = torch.rand(len(prompts) * group, length, generator=rng, dtype=torch.float64)
    return generate(policy, prompts, uniforms, scores=True)
