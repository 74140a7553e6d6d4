"""DPPO-TV: a trust region in probabilities instead of a clip of their ratio."""

from torch import Tensor

from moe_rl.losses.base import LossInputs, weighted_logprobs


def dppo_tv_loss(inputs: LossInputs, *, distance: float = 0.2, bound: float = 5.0) -> Tensor:
    """A policy gradient that stops where a token's probability has moved too far already.

        l_it = -M_it sg(min(w_it, bound)) A_i log pi_it,  sg stop-gradient
        M_it = 0 where |pi_it - old_it| > distance and the token moves on: A_i > 0 and w_it > 1, or
               A_i < 0 and w_it < 1; else 1

    The denominator is to be the engine's log-probs, `old_logprobs=rollout`: with recomputed ones it
    fails in the paper (5.2). For advantages that are not divided by their standard deviation, and
    aggregation by `fixed_length`, as in Dr. GRPO. Mask and truncation are no-ops on policy.

    Source: DPPO (arXiv 2602.04879), binary total variation; 0.2 and 5 are those of its 30B MoE runs
    (appendix, scaling experiments). Its stability tests have 0.15 and no bound (bound=inf), verl's
    code 20.
    """
    log_ratio = inputs.log_ratio.detach()
    moved = (inputs.logprobs.detach().exp() - inputs.old_logprobs.exp()).abs() > distance
    onwards = inputs.advantages * log_ratio > 0
    return -weighted_logprobs(
        inputs, log_ratio.exp().clamp(max=bound).masked_fill(moved & onwards, 0.0)
    )
