"""GSPO: one importance ratio a sequence."""

from __future__ import annotations

from torch import Tensor

from moe_rl.losses.base import LossOutput, clip_log_ratio, prepare

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
    """GSPO's loss, GSPO paper (arXiv 2507.18071) eq. 5-7:

        loss = -1/N sum_i min(s_i A_i, clip(s_i, 1 - low, 1 + high) A_i)
        s_i  = exp(1/|y_i| sum_t (logprobs_it - old_logprobs_it))

    The clip keeps or drops whole sequences: clipped_low and clipped_high are equal over a
    sequence's tokens. On responses of one token this is GRPO with the same clip.

    Args:
        logprobs: [B, T], nats, of the policy being trained; the only input that gets a gradient.
        old_logprobs: [B, T], nats, of the policy that the ratio is taken against.
        advantages: [B], one a sequence.
        mask: bool [B, T], True at response tokens; padding may hold anything, NaN included.
        clip_low: the ratio's lower bound is 1 - clip_low.
        clip_high: the ratio's upper bound is 1 + clip_high.
        num_sequences: N, the sequences of the whole minibatch over all micro-batches and ranks,
            so that the parts' losses sum to the whole's; B by default.

    A sequence without a token adds 0 to the sum and still counts in N.

    Raises:
        ValueError: for a shape, dtype, clip range or divisor that cannot be meant.
    """
    log_ratio, advantages, lengths, divisor = prepare(
        logprobs, old_logprobs, advantages, mask, clip_low, clip_high, num_sequences
    )
    # An advantage of 0 takes a sequence without a token out of the sum.
    advantages = advantages.masked_fill(~mask.any(1), 0.0)
    picked, low, high = clip_log_ratio(log_ratio.sum(1) / lengths, advantages, clip_low, clip_high)
    loss = -(picked.exp() * advantages).sum() / divisor
    return LossOutput(loss=loss, clipped_low=low[:, None] & mask, clipped_high=high[:, None] & mask)
