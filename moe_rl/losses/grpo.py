"""GRPO: one importance ratio a token."""

from __future__ import annotations

from torch import Tensor

from moe_rl.losses.base import LossOutput, clip_log_ratio, prepare, spread_advantages

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
    log_ratio, advantages, lengths, divisor = prepare(
        logprobs, old_logprobs, advantages, mask, clip_low, clip_high, num_sequences
    )
    token_advantages = spread_advantages(advantages, mask)
    picked, clipped_low, clipped_high = clip_log_ratio(
        log_ratio, token_advantages, clip_low, clip_high
    )
    surrogate = picked.exp() * token_advantages
    loss = -(surrogate.sum(1) / lengths).sum() / divisor
    return LossOutput(loss=loss, clipped_low=clipped_low, clipped_high=clipped_high)
