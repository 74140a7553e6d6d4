"""TIS: GRPO, weighted by how much more the trainer likes a token than the engine that drew it."""

from torch import Tensor

from moe_rl.losses.base import LossInputs, clipped_surrogate


def tis_loss(
    inputs: LossInputs, *, clip_low: float = 0.2, clip_high: float = 0.27, bound: float = 2.0
) -> Tensor:
    """GRPO's loss with a truncated importance weight of trainer against engine.

        l_it = -min(rho_it, bound) min(w_it A_i, clip(w_it, 1 - low, 1 + high) A_i)
        rho_it = exp(old_logprobs_it - rollout_logprobs_it)

    Source: "Your efficient RL framework secretly brings you off-policy RL training" (Flash-RL,
    2025); bound 2 is verl's `rollout_is_threshold`. A no-op where engine and trainer agree, and
    with old_logprobs=rollout.
    """
    weight = inputs.log_correction.exp().clamp(max=bound)
    surrogate = clipped_surrogate(inputs.log_ratio, inputs.advantages, clip_low, clip_high)
    return -weight * surrogate
