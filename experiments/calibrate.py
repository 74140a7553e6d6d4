"""Find the router noise that stands for a given disagreement between two engines.

Two passes over the same tokens with equal weights and independent noise choose other experts at a
share of (token, layer) pairs, and at a share of tokens in at least one layer. Both grow with the
noise, so bisection finds the noise for a share.

R3 (arXiv 2510.11370) reports 10% of routers and 94% of tokens for a model of dozens of layers. A
model of few layers cannot have both: which of the two it should share is a choice of the study.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from moe_rl.batch import RolloutBatch, response_positions
from moe_rl.config import ConfigError, RunConfig
from moe_rl.metrics.published import MOE_ROUTERS
from moe_rl.policy.forward import ForwardOptions, response_pass
from moe_rl.policy.pass_noise import PassNoise
from moe_rl.policy.policy import Policy
from moe_rl.rollout.cached import CachedEngine
from moe_rl.rollout.request import Request
from moe_rl.routing.statistics import churn, disagreement
from moe_rl.runtime.process import prepare_process
from moe_rl.runtime.seeding import generator
from moe_rl.tasks import Task, task_of
from moe_rl.training.cold_start import starting_policy

Of = Literal["routers", "tokens"]
R3_SHARES: dict[Of, float] = {"routers": MOE_ROUTERS, "tokens": 0.94}
"""Shares that differ between rollout and training engine, R3 paper (arXiv 2510.11370)."""

_SMALLEST_NOISE, _LARGEST_NOISE = 1e-4, 64.0
# Halvings of the ratio between the bounds: they end within 0.1% of each other.
_BISECTIONS = 14


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Result of `calibrate_noise`."""

    noise: float
    """Standard deviation in logit units."""
    router_disagreement: float
    """Share of (token, layer) pairs whose expert sets differ."""
    token_disagreement: float
    """Share of tokens with at least one such layer."""
    churn: float
    """Share of expert slots that differ."""
    tokens: int
    """Response tokens measured."""

    def describe(self) -> str:
        """One line for a person."""
        return (
            f"router_noise {self.noise:.4g}: {self.router_disagreement:.1%} of routers, "
            f"{self.token_disagreement:.1%} of tokens and {self.churn:.1%} of expert slots differ "
            f"between two passes ({self.tokens} tokens)"
        )

    def share(self, of: Of) -> float:
        """The disagreement of `of`."""
        return self.router_disagreement if of == "routers" else self.token_disagreement


def calibrate_noise(
    config: RunConfig, cold_start_cache: Path, *, of: Of = "routers", share: float | None = None
) -> Calibration:
    """Noise at which two passes disagree, on one rollout of the cold-started policy.

    Args:
        of: what disagrees, pairs of (token, layer) or tokens.
        share: how much of it, in (0, 1); None: R3's figure.

    Raises:
        ConfigError: a share outside (0, 1), or one that no noise reaches.
    """
    share = R3_SHARES[of] if share is None else share
    if not 0.0 < share < 1.0:
        raise ConfigError(f"share={share}: must be between 0 and 1, both excluded")
    prepare_process(config.num_threads)
    task = task_of(config.task)
    policy = starting_policy(config, task, cold_start_cache)
    batch = _rollout(config, policy, task)
    low, high = _SMALLEST_NOISE, _LARGEST_NOISE
    if _measure(config, policy, batch, high).share(of) < share:
        raise ConfigError(f"share={share}: not reached with any noise up to {high:g}; choose less")
    for _ in range(_BISECTIONS):
        middle = math.sqrt(low * high)
        if _measure(config, policy, batch, middle).share(of) < share:
            low = middle
        else:
            high = middle
    return _measure(config, policy, batch, high)


def _rollout(config: RunConfig, policy: Policy, task: Task) -> RolloutBatch:
    problems = task.prompts(generator(config.seed, "calibrate"), config.prompts_per_rollout)
    request = Request(
        prompts=[problem.prompt for problem in problems],
        numbers=range(len(problems)),
        seed=config.seed,
        purpose="calibrate_samples",
        group_size=config.group_size,
        max_tokens=task.max_response_tokens,
    )
    return CachedEngine(policy).sample(request)


@torch.no_grad()
def _measure(config: RunConfig, policy: Policy, batch: RolloutBatch, noise: float) -> Calibration:
    routes = []
    for purpose in ("first", "second"):
        source = PassNoise(
            std=noise,
            seed=config.seed,
            step=0,
            purpose=f"calibrate_{purpose}",
            prompts=range(batch.prompt_ids.shape[0]),
            group_size=batch.group_size,
        )
        output = response_pass(policy, batch, ForwardOptions(noise=source))
        assert output.routed_experts is not None
        routes.append(response_positions(output.routed_experts, batch.prompt_ids.shape[1]))
    mask = batch.response_mask
    differ = churn(routes[0], routes[1], mask)
    return Calibration(noise=noise, tokens=int(mask.sum()), **disagreement(differ))
