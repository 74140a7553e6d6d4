"""CISPO: the ratio is a bounded weight of the policy gradient, and no token is dropped."""

from torch import Tensor

from moe_rl.losses.base import LossInputs, weighted_logprobs


def cispo_loss(inputs: LossInputs, *, bound: float = 5.0) -> Tensor:
    """A policy gradient whose importance weight is truncated.

        l_it = -sg(min(w_it, bound)) A_i log pi_it,  sg stop-gradient

    For aggregation by `token_mean`. The truncation is a no-op where w <= bound.

    Source: MiniMax-M1 (arXiv 2506.13585), eq. 4-5. Its experiments have no lower bound, and it does
    not give the upper one; 5 is the one that TRL names for ScaleRL (arXiv 2510.13786). verl also
    clips from below, at 1 - clip_ratio_low.
    """
    return -weighted_logprobs(inputs, inputs.log_ratio.detach().exp().clamp(max=bound))
