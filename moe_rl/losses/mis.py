"""MIS: GRPO without the responses on which trainer and engine disagree."""

import math

from torch import Tensor

from moe_rl.losses.base import LossInputs, clipped_surrogate


def mis_loss(
    inputs: LossInputs,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.27,
    lowest: float = 0.99,
    highest: float = 1.01,
) -> Tensor:
    """GRPO's loss, 0 for a response whose mean ratio of trainer to engine is out of range.

        l_it = -1[lowest <= rho_i <= highest] min(w_it A_i, clip(w_it, 1 - low, 1 + high) A_i)
        rho_i = exp(1/|y_i| sum_t (old_logprobs_it - rollout_logprobs_it))

    Source: masked importance sampling by the geometric mean, Liu and Li, "When speed kills
    stability" (2025). A no-op where engine and trainer agree, and with old_logprobs=rollout.
    """
    mean = inputs.sequence_mean(inputs.log_correction)
    keep = (mean >= math.log(lowest)) & (mean <= math.log(highest))
    surrogate = clipped_surrogate(inputs.log_ratio, inputs.advantages, clip_low, clip_high)
    return -surrogate.where(keep, 0.0)
