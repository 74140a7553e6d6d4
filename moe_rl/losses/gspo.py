"""GSPO: one importance ratio per sequence."""

from torch import Tensor

from moe_rl.losses.base import LossInputs, clipped_surrogate


def gspo_loss(inputs: LossInputs, *, clip_low: float = 3e-4, clip_high: float = 4e-4) -> Tensor:
    """GSPO's loss: each token of a response has the response's loss.

        l_it = -min(s_i A_i, clip(s_i, 1 - low, 1 + high) A_i)
        s_i  = exp(1/|y_i| sum_t (logprobs_it - old_logprobs_it))

    The clip keeps or drops whole responses. On responses of one token this is GRPO with the same
    clip.

    Source: GSPO paper (arXiv 2507.18071), eq. 5-7; the clip range is that of 5.1. The clip is a
    no-op on policy, where s = 1.
    """
    log_ratio = inputs.sequence_mean(inputs.log_ratio)
    return -clipped_surrogate(log_ratio, inputs.advantages, clip_low, clip_high)
