"""GRPO: one importance ratio per token."""

from torch import Tensor

from moe_rl.losses.base import LossOutput, clipped_token_loss, prepare_inputs

CLIP_LOW = 0.2  # GSPO paper (arXiv 2507.18071), 5.1: the GRPO baseline's left range
CLIP_HIGH = 0.27  # GSPO paper, 5.1: the GRPO baseline's right range


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = CLIP_LOW,
    clip_high: float = CLIP_HIGH,
    num_sequences: int | None = None,
) -> LossOutput:
    """GRPO's loss without a KL term; arguments and errors are those of `LossFunction`.

        loss = -1/N sum_i 1/|y_i| sum_t min(w_it A_i, clip(w_it, 1 - low, 1 + high) A_i)
        w_it = exp(logprobs_it - old_logprobs_it)

    Source: GSPO paper (arXiv 2507.18071) eq. 2-3. The clip is a no-op on policy, where w = 1.
    """
    inputs = prepare_inputs(logprobs, old_logprobs, advantages, mask, num_sequences)
    return clipped_token_loss(inputs.log_ratio, inputs, clip_low, clip_high)
