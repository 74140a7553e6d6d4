"""Rollout engines: what one must give, and the choice among them.

cached   the policy itself with a key-value cache (cached.py): the default
vllm     vLLM on a copy of the weights (vllm.py): the extra `vllm`
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from moe_rl.batch import RolloutBatch
from moe_rl.config import EngineName
from moe_rl.policy.policy import Policy
from moe_rl.rollout.cached import generate
from moe_rl.rollout.router_noise import RouterNoise
from moe_rl.runtime.choice import Choice
from moe_rl.runtime.seeding import uniforms


@dataclass(frozen=True, kw_only=True)
class Request:
    """One rollout to sample: all that decides its tokens besides the weights."""

    prompts: Sequence[str]
    """P texts."""
    numbers: Sequence[int]
    """Number of each prompt in its rollout step: with step and sample, the address of a draw."""
    seed: int
    """Run seed."""
    purpose: str
    step: int
    group_size: int
    """Responses G to each prompt."""
    max_tokens: int
    """Longest response."""
    noise: RouterNoise | None = None
    """Router noise of this pass."""
    scores: bool = False
    """Bring back router logits as well."""


class Engine(Protocol):
    """Samples a group of responses to each prompt with the policy's weights as they are now."""

    def sample(self, request: Request) -> RolloutBatch:
        """The G responses to each of P prompts, B = P * G, neighbours within a group.

        Of the batch, `rollout_logprobs` float32 [B, T] are the engine's own, at the policy's
        temperature, of the tokens it sampled; `routed_experts` int16 [B, Sp + T, L, K] are the
        choices it made, -1 where it has no record, which at a position that predicts a response
        token must not be.

        Raises:
            FloatingPointError: the weights have diverged.
            ValueError: the engine cannot do what is asked, or gave something malformed.
        """


@dataclass(frozen=True)
class CachedEngine:
    """The policy itself. Its tokens are a pure function of the weights and the request."""

    policy: Policy

    def sample(self, request: Request) -> RolloutBatch:
        """See `Engine`."""
        draws = uniforms(
            request.seed,
            request.purpose,
            step=request.step,
            prompts=request.numbers,
            group_size=request.group_size,
            count=request.max_tokens,
        )
        return generate(
            self.policy,
            list(request.prompts),
            torch.from_numpy(draws),
            noise=request.noise,
            scores=request.scores,
        )


def make_engine(name: EngineName, policy: Policy) -> Engine:
    """The engine of that name, sampling with the weights of `policy`.

    Raises:
        ConfigError: its package is not installed.
    """
    if name == "vllm":
        from moe_rl.rollout.vllm import VllmEngine

        return VllmEngine(policy)
    return CachedEngine(policy)


def choose_engine(name: EngineName) -> Choice:
    """The engine that a config's `engine` means, with its reason."""
    if name == "vllm":
        return Choice(name, "asked for by name; it samples with a copy of the weights")
    return Choice(name, "the policy itself with a key-value cache, prompts read once per group")
