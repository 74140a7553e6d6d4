"""GSPO: one importance ratio per sequence."""

from torch import Tensor

from moe_rl.losses.base import LossOutput, clip_log_ratio, prepare_inputs

CLIP_LOW = 3e-4  # GSPO paper (arXiv 2507.18071), 5.1: GSPO's left range
CLIP_HIGH = 4e-4  # GSPO paper, 5.1: GSPO's right range


def gspo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = CLIP_LOW,
    clip_high: float = CLIP_HIGH,
    num_sequences: int | None = None,
) -> LossOutput:
    """GSPO's loss; arguments and errors are those of `LossFunction`.

        loss = -1/N sum_i min(s_i A_i, clip(s_i, 1 - low, 1 + high) A_i)
        s_i  = exp(1/|y_i| sum_t (logprobs_it - old_logprobs_it))

    The clip keeps or drops whole sequences: clipped_low and clipped_high are equal over a
    sequence's tokens. On responses of one token this is GRPO with the same clip.

    Source: GSPO paper (arXiv 2507.18071) eq. 5-7. The clip is a no-op on policy, where s = 1.
    """
    inputs = prepare_inputs(logprobs, old_logprobs, advantages, mask, num_sequences)
    # An advantage of 0 takes a sequence without a token out of the sum.
    advantages = inputs.advantages.masked_fill(~mask.any(1), 0.0)
    sequence_log_ratio = inputs.log_ratio.sum(1) / inputs.lengths
    picked, low, high = clip_log_ratio(sequence_log_ratio, advantages, clip_low, clip_high)
    loss = -(picked.exp() * advantages).sum() / inputs.num_sequences
    return LossOutput(loss=loss, clipped_low=low[:, None] & mask, clipped_high=high[:, None] & mask)
