"""GMPO: the geometric mean of a response's clipped token ratios."""

import math

from torch import Tensor

from moe_rl.losses.base import LossInputs, clip_log_ratio


def gmpo_loss(inputs: LossInputs, *, log_clip: float = 0.4) -> Tensor:
    """Each token of a response has the response's loss.

        l_it = -A_i exp(1/|y_i| sum_t log w'_it)
        w'_it   the ratio that min(w_it A_i, clip(w_it, e^-log_clip, e^log_clip) A_i) picks

    On responses of one token this is GRPO with that clip. The clip is a no-op on policy.

    Source: GMPO (arXiv 2507.20673), eq. 4, with its range (e^-0.4, e^0.4).
    """
    low, high = -math.expm1(-log_clip), math.expm1(log_clip)
    picked = clip_log_ratio(inputs.log_ratio, inputs.advantages, low, high)
    return -inputs.sequence_mean(picked).exp() * inputs.advantages
