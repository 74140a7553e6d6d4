"""GRPO: one importance ratio per token."""

from torch import Tensor

from moe_rl.losses.base import LossInputs, clipped_surrogate


def grpo_loss(inputs: LossInputs, *, clip_low: float = 0.2, clip_high: float = 0.27) -> Tensor:
    """GRPO's loss without a KL term.

        l_it = -min(w_it A_i, clip(w_it, 1 - low, 1 + high) A_i)
        w_it = exp(logprobs_it - old_logprobs_it)

    Source: GSPO paper (arXiv 2507.18071), eq. 2-3; the clip range is that of its GRPO baseline,
    5.1. The clip is a no-op on policy, where w = 1.
    """
    return -clipped_surrogate(inputs.log_ratio, inputs.advantages, clip_low, clip_high)
