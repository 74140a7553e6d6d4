"""GSPO-token: GSPO's sequence ratio, with one advantage per token where wanted."""

from torch import Tensor

from moe_rl.losses.base import LossOutput, clipped_token_loss, prepare_inputs
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
    """GSPO-token's loss; arguments and errors are those of `LossFunction`.

        loss = -1/N sum_i 1/|y_i| sum_t min(s_it A_it, clip(s_it, 1 - low, 1 + high) A_it)
        s_it = sg(s_i) pi_it / sg(pi_it),  s_i the sequence ratio of GSPO (eq. 7), sg stop-gradient

    Advantages may be [B, T], one per token. With one per sequence this is a no-op beside
    `gspo_loss`: s_it has the value of s_i, so that loss, clip and gradient are equal.

    Source: GSPO paper (arXiv 2507.18071) eq. 13-14.
    """
    inputs = prepare_inputs(
        logprobs, old_logprobs, advantages, mask, num_sequences, token_advantages=True
    )
    log_ratio = inputs.log_ratio
    sequence_log_ratio = (log_ratio.detach().sum(1) / inputs.lengths)[:, None]
    # pi / sg(pi) in logs: 0 in value, the token's own log-prob in gradient. Log-probs of -inf would
    # make it inf - inf; their sequence has s = 0, which passes no gradient on in any case.
    unreachable = sequence_log_ratio == float("-inf")
    own = log_ratio.masked_fill(unreachable, 0.0)
    return clipped_token_loss(
        sequence_log_ratio + (own - own.detach()), inputs, clip_low, clip_high
    )
