"""Geo-RS: GRPO without the responses on which trainer and engine disagree, token by token."""

import math

from torch import Tensor

from moe_rl.losses.base import LossInputs, clip_log_ratio


def geo_rs_loss(
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

    A dropped response still counts in the mean over responses. A no-op where engine and trainer
    agree, and with `old_logprobs=rollout`.

    Source: rejection by the geometric mean, Liu and Li, "When speed kills stability" (2025), part
    3; the range is SkyRL's, verl's `decoupled_geo_rs` has 0.999 to 1.001.
    """
    mean = inputs.sequence_mean(inputs.log_correction)
    drop = (mean < math.log(lowest)) | (mean > math.log(highest))
    picked = clip_log_ratio(inputs.log_ratio, inputs.advantages, clip_low, clip_high)
    # Before exp: an overflowing ratio of a dropped response would make its gradient 0 * inf = NaN.
    return -(picked.masked_fill(drop, 0.0).exp() * inputs.advantages).masked_fill(drop, 0.0)
