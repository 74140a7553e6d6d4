"""DPPO-TV: a trust region in probabilities instead of a clip of their ratio."""

from torch import Tensor

from moe_rl.losses.base import LossInputs


def dppo_tv_loss(inputs: LossInputs, *, distance: float = 0.2, bound: float = 20.0) -> Tensor:
    """A policy gradient that stops where a token's probability has moved too far already.

        l_it = -M_it sg(min(w_it, bound)) A_i log pi_it,  sg stop-gradient
        M_it = 0 where |pi_it - old_it| > distance and the token moves on: A_i > 0 and w_it > 1, or
               A_i < 0 and w_it < 1

    Source: DPPO (arXiv 2602.04879), 3, total variation. The paper wants the engine's log-probs in
    the denominator: old_logprobs=rollout. The mask is a no-op on policy.
    """
    log_ratio = inputs.log_ratio.detach()
    moved = (inputs.logprobs.detach().exp() - inputs.old_logprobs.exp()).abs() > distance
    onwards = inputs.advantages * log_ratio > 0
    weight = log_ratio.exp().clamp(max=bound).masked_fill(moved & onwards, 0.0)
    return -weight * inputs.advantages * inputs.logprobs
