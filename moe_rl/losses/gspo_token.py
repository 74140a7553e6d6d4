"""GSPO-token: GSPO's sequence ratio, with one advantage per token where wanted."""

from torch import Tensor

from moe_rl.losses.base import LossInputs, clipped_surrogate


def gspo_token_loss(
    inputs: LossInputs, *, clip_low: float = 3e-4, clip_high: float = 4e-4
) -> Tensor:
    """GSPO-token's loss.

        l_it = -min(s_it A_it, clip(s_it, 1 - low, 1 + high) A_it)
        s_it = sg(s_i) pi_it / sg(pi_it),  s_i the sequence ratio of GSPO (eq. 7), sg stop-gradient

    With one advantage per sequence this is a no-op beside `gspo_loss`: s_it has the value of s_i,
    so that loss, clip and gradient are equal.

    Source: GSPO paper (arXiv 2507.18071), eq. 13-14.
    """
    sequence = inputs.sequence_mean(inputs.log_ratio.detach())
    # pi / sg(pi) in logs: 0 in value, the token's own log-prob in gradient. Log-probs of -inf would
    # make it inf - inf; their sequence has s = 0, which passes no gradient on in any case.
    own = inputs.log_ratio.masked_fill(sequence == float("-inf"), 0.0)
    log_ratio = sequence + (own - own.detach())
    return -clipped_surrogate(log_ratio, inputs.advantages, clip_low, clip_high)
