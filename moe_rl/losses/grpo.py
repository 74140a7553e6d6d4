"""GRPO: one importance ratio a token."""

from __future__ import annotations

from torch import Tensor

from moe_rl.losses.base import (
    LossOutput,
    check_clip_range,
    check_inputs,
    clip_log_ratio,
    masked_log_ratio,
    sequence_divisor,
)

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
    """GRPO's loss, GSPO paper (arXiv 2507.18071) eq. 2-3, without a KL term:

        loss = -1/N sum_i 1/|y_i| sum_t min(w_it A_i, clip(w_it, 1 - low, 1 + high) A_i)
        w_it = exp(logprobs_it - old_logprobs_it)

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
    check_inputs(logprobs, old_logprobs, advantages, mask)
    check_clip_range(clip_low, clip_high)
    divisor = sequence_divisor(num_sequences, logprobs.shape[0])
    log_ratio = masked_log_ratio(logprobs, old_logprobs, mask)
    token_advantages = advantages.detach().to(log_ratio.dtype)[:, None].expand_as(mask)
    token_advantages = token_advantages.masked_fill(~mask, 0.0)
    picked, clipped_low, clipped_high = clip_log_ratio(
        log_ratio, token_advantages, clip_low, clip_high
    )
    surrogate = picked.exp() * token_advantages
    lengths = mask.sum(1).clamp(min=1)
    loss = -(surrogate.sum(1) / lengths).sum() / divisor
    return LossOutput(loss=loss, clipped_low=clipped_low, clipped_high=clipped_high)
