"""GSPO-token: GSPO's sequence ratio, with an advantage a token where wanted."""

from __future__ import annotations

from torch import Tensor

from moe_rl.losses.base import LossOutput, clip_log_ratio, prepare, spread_advantages
from moe_rl.losses.gspo import CLIP_HIGH, CLIP_LOW


def gspo_token_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = CLIP_LOW,
    clip_high: float = CLIP_HIGH,
    num_sequences: int | None = None,
) -> LossOutput:
    """GSPO-token's loss, GSPO paper (arXiv 2507.18071) eq. 13-14, sg being stop-gradient:

        loss = -1/N sum_i 1/|y_i| sum_t min(s_it A_it, clip(s_it, 1 - low, 1 + high) A_it)
        s_it = sg(s_i) pi_it / sg(pi_it),  s_i the sequence ratio of GSPO (eq. 7)

    s_it has the value of s_i, so that with A_it = A_i the loss, the clip and the gradient are
    those of `gspo_loss`; the point is an advantage that differs between tokens.

    Args:
        logprobs: [B, T], nats, of the policy being trained; the only input that gets a gradient.
        old_logprobs: [B, T], nats, of the policy that the ratio is taken against.
        advantages: [B], one a sequence, or [B, T], one a token.
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
        logprobs,
        old_logprobs,
        advantages,
        mask,
        clip_low,
        clip_high,
        num_sequences,
        token_advantages=True,
    )
    sequence_log_ratio = (log_ratio.detach().sum(1) / lengths)[:, None]
    # pi / sg(pi) in logs: 0 in value, the token's own score in gradient. Log-probs of -inf would
    # make it inf - inf; their sequence has s = 0, which passes no gradient on in any case.
    unreachable = sequence_log_ratio == float("-inf")
    own_score = log_ratio.masked_fill(unreachable, 0.0)
    token_log_ratio = sequence_log_ratio + (own_score - own_score.detach())

    token_advantages = spread_advantages(advantages, mask)
    picked, clipped_low, clipped_high = clip_log_ratio(
        token_log_ratio, token_advantages, clip_low, clip_high
    )
    surrogate = picked.exp() * token_advantages
    loss = -(surrogate.sum(1) / lengths).sum() / divisor
    return LossOutput(loss=loss, clipped_low=clipped_low, clipped_high=clipped_high)
