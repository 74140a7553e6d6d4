"""MIS: GRPO, weighted by the sequence ratio of trainer to engine, without responses far off."""

import math

from torch import Tensor

from moe_rl.losses.base import LossInputs, clip_log_ratio


def mis_loss(
    inputs: LossInputs, *, clip_low: float = 0.2, clip_high: float = 0.27, bound: float = 2.0
) -> Tensor:
    """GRPO's loss with a masked importance weight of trainer against engine, one per response.

        l_it = -1[rho_i <= bound] rho_i min(w_it A_i, clip(w_it, 1 - low, 1 + high) A_i)
        rho_i = prod_t exp(old_logprobs_it - rollout_logprobs_it)

    A dropped response still counts in the mean over responses. A no-op where engine and trainer
    agree, and with `old_logprobs=rollout`.

    Source: masked importance sampling, sequence level, Liu and Li, "When speed kills stability"
    (2025), 4.2.1; bound 2 is that of its truncated runs, the masked ones do not name theirs. TRL's
    `sequence_mask` has 3.
    """
    log_rho = inputs.log_correction.sum(1, keepdim=True)
    drop = log_rho > math.log(bound)
    picked = clip_log_ratio(inputs.log_ratio, inputs.advantages, clip_low, clip_high)
    # One exp of the sum: rho may underflow where w overflows, and 0 * inf is NaN.
    weight = (picked + log_rho).masked_fill(drop, 0.0).exp()
    return -(weight * inputs.advantages).masked_fill(drop, 0.0)
