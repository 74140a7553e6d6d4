"""DAPO: a wider upper clip, and every token of an update counts alike."""

from torch import Tensor

from moe_rl.losses.base import LossInputs, clipped_surrogate


def dapo_loss(inputs: LossInputs, *, clip_low: float = 0.2, clip_high: float = 0.28) -> Tensor:
    """GRPO's loss with DAPO's clip range, for aggregation by `token_mean`.

        l_it = -min(w_it A_i, clip(w_it, 1 - low, 1 + high) A_i)
        L    = 1/M sum_it l_it,  M tokens

    Source: DAPO (arXiv 2503.14476), eq. 8 and 4.1. Its dynamic sampling and its overlong reward
    shaping are no part of the loss. The clip is a no-op on policy.
    """
    return -clipped_surrogate(inputs.log_ratio, inputs.advantages, clip_low, clip_high)
