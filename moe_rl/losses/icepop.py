"""IcePop: GRPO without the tokens on which trainer and engine disagree."""

import math

from torch import Tensor

from moe_rl.losses.base import LossInputs, clip_log_ratio


def icepop_loss(
    inputs: LossInputs,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.27,
    lowest: float = 0.5,
    highest: float = 5.0,
) -> Tensor:
    """GRPO's loss, weighted by the ratio of trainer to engine, 0 for a token where that is far off.

        l_it = -1[lowest <= rho_it <= highest] rho_it min(w_it A_i, clip(w_it, ...) A_i)
        rho_it = exp(old_logprobs_it - rollout_logprobs_it)

    A no-op where engine and trainer agree, and with `old_logprobs=rollout`.

    Source: IcePop, Ring-1T (arXiv 2510.18855), 0.5 and 5 from its training recipe. Its clip range
    is not given; the one here is GRPO's.
    """
    log_rho = inputs.log_correction
    drop = (log_rho < math.log(lowest)) | (log_rho > math.log(highest))
    picked = clip_log_ratio(inputs.log_ratio, inputs.advantages, clip_low, clip_high)
    # Before exp: an overflowing ratio of a dropped token would make its gradient 0 * inf = NaN.
    weight = (picked + log_rho).masked_fill(drop, 0.0).exp()
    return -(weight * inputs.advantages).masked_fill(drop, 0.0)
