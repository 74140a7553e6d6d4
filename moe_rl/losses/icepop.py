"""IcePop: GRPO without the tokens on which trainer and engine disagree."""

import math

from torch import Tensor

from moe_rl.losses.base import LossInputs, clipped_surrogate


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

    Source: IcePop, Ring-1T (arXiv 2510.18855), range 0.5 to 5. A no-op where engine and trainer
    agree, and with old_logprobs=rollout.
    """
    log_rho = inputs.log_correction
    keep = (log_rho >= math.log(lowest)) & (log_rho <= math.log(highest))
    weight = log_rho.exp().where(keep, 0.0)
    surrogate = clipped_surrogate(inputs.log_ratio, inputs.advantages, clip_low, clip_high)
    return -weight * surrogate.where(keep, 0.0)
