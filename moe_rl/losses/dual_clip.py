"""GRPO with dual clip: the surrogate's last branch is bounded too."""

import math

from torch import Tensor

from moe_rl.losses.base import LossInputs, clip_log_ratio


def dual_clip_loss(
    inputs: LossInputs, *, clip_low: float = 0.2, clip_high: float = 0.27, bound: float = 3.0
) -> Tensor:
    """GRPO's loss, with a token of negative advantage worth at most `bound` times its advantage.

        l_it = -min(w_it A_i, clip(w_it, 1 - low, 1 + high) A_i)     A_i >= 0
        l_it = -max(min(w_it A_i, clip(...) A_i), bound A_i)         A_i < 0

    A no-op where no token with A < 0 has w > bound.

    Source: dual-clip PPO (arXiv 1912.09729), eq. 5, with a bound above 1; 3 is that of verl, where
    it is always on (`clip_ratio_c`). The clip range is that of GRPO here.
    """
    picked = clip_log_ratio(inputs.log_ratio, inputs.advantages, clip_low, clip_high)
    log_bound = math.log(bound)
    capped = (inputs.advantages < 0) & (inputs.log_ratio > log_bound)
    return -picked.masked_fill(capped, log_bound).exp() * inputs.advantages
