"""TIS: GRPO, weighted by how much more the trainer likes a token than the engine that drew it."""

import math

from torch import Tensor

from moe_rl.losses.base import LossInputs, clip_log_ratio


def tis_loss(
    inputs: LossInputs, *, clip_low: float = 0.2, clip_high: float = 0.27, bound: float = 2.0
) -> Tensor:
    """GRPO's loss with a truncated importance weight of trainer against engine, one per token.

        l_it = -min(rho_it, bound) min(w_it A_i, clip(w_it, 1 - low, 1 + high) A_i)
        rho_it = exp(old_logprobs_it - rollout_logprobs_it)

    A no-op where engine and trainer agree, and with `old_logprobs=rollout`.

    Source: Yao et al., "Your efficient RL framework secretly brings you off-policy RL training"
    (2025), which leaves the bound open; 2 is verl's `rollout_is_threshold`.
    """
    log_weight = inputs.log_correction.clamp(max=math.log(bound))
    picked = clip_log_ratio(inputs.log_ratio, inputs.advantages, clip_low, clip_high)
    # One exp of the sum: rho may underflow where w overflows, and 0 * inf is NaN.
    return -(picked + log_weight).exp() * inputs.advantages
