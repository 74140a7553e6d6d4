"""CISPO: the ratio is a bounded weight of the policy gradient, and no token is dropped."""

from torch import Tensor

from moe_rl.losses.base import LossInputs


def cispo_loss(inputs: LossInputs, *, bound: float = 5.0) -> Tensor:
    """A policy gradient whose importance weight is truncated.

        l_it = -sg(min(w_it, bound)) A_i log pi_it,  sg stop-gradient

    For aggregation by `token_mean`. Source: MiniMax-M1 (arXiv 2506.13585), eq. 4-5, which has no
    lower bound and leaves the upper one open; 5 is that of ScaleRL (arXiv 2510.13786) and TRL's
    advice. The truncation is a no-op where w <= bound.
    """
    weight = inputs.log_ratio.detach().exp().clamp(max=bound)
    return -weight * inputs.advantages * inputs.logprobs
