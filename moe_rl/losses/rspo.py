"""RSPO: a token whose routers have moved counts less."""

import math

from torch import Tensor

from moe_rl.losses.base import LossInputs, clip_log_ratio


def rspo_loss(inputs: LossInputs, *, log_clip: float = 0.4, lowest: float = 0.7) -> Tensor:
    """GMPO's loss of ratios that are scaled down where routers left the old policy's experts.

        l_it = -A_i exp(1/|y_i| sum_t log v'_it)
        v_it  = w_it sg(max(gamma_it, lowest)),  sg stop-gradient
        v'_it   the ratio that min(v_it A_i, clip(v_it, e^-log_clip, e^log_clip) A_i) picks
        gamma_it = exp(-mean over layers and old experts e of |log r(e) - log r_old(e)|), the
                   metric `routing/shift`, with r the router's softmax

    A no-op beside GMPO's loss where no router has moved, as on policy without noise.

    Source: RSPO (arXiv 2510.23027, second version, and ACL 2026): router shift rescales the ratios
    of GMPO before clip and mean. The first version multiplies after the clip; the authors' code
    takes the product over layers where the paper has the mean. 0.7 is that code's default; the clip
    range is GMPO's.
    """
    assert inputs.router_shift is not None, "the learner records routers for a loss that reads them"
    scaled = inputs.log_ratio + inputs.router_shift.clamp(min=lowest).log()
    low, high = -math.expm1(-log_clip), math.expm1(log_clip)
    # In padding A is 0, and so is what is picked.
    picked = clip_log_ratio(scaled, inputs.advantages, low, high)
    return -inputs.sequence_mean(picked).exp() * inputs.advantages
