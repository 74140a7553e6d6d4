"""Integrations: the instruments of an update on what a trainer's loss function is given.

What a loss sees is enough for the ratio's statistics, the clip shares and the branches of
the gradient. Routers are out of its sight. Definitions: docs/metrics.md.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moe_rl.metrics.branches import branch_shares
from moe_rl.metrics.ratios import clip_shares, ratio_statistics


def loss_metrics(
    loss: Callable[[Tensor], Tensor],
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
) -> dict[str, float]:
    """Every metric of a loss that needs no routes.

    Args:
        loss: the scalar loss as a function of the log-probs; it is called once more, for the
            gradient in each of them, which says what it does with each token.
        logprobs: [B, T], of the policy being trained; its own graph is not touched.
        old_logprobs: [B, T], what the ratio is divided by.
        advantages: [B, T].
        mask: bool or 0/1 [B, T], response tokens.

    Returns:
        No metric where no token counts: trainers fill up batches with such sequences, and a mean
        over them would be NaN.
    """
    mask = mask.bool()
    if not bool(mask.any()):
        return {}
    new, old, advantages = logprobs.detach(), old_logprobs.detach(), advantages.detach()
    # A loss that draws, as verl's clip_cov, must not move the trainer's random state.
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        leaf = new.clone().requires_grad_()
        # Keeps the leaf in the graph of a loss that does not depend on it: all advantages 0.
        value = loss(leaf) + 0.0 * leaf.sum()
        gradient = torch.autograd.grad(value, leaf)[0]
    unknown = torch.zeros_like(mask)
    branches = branch_shares(gradient, new - old, advantages, mask, unknown)
    return {
        **ratio_statistics(new, old, mask),
        **clip_shares(gradient, advantages, mask),
        # Whether a router has flipped is not known here.
        **{name: share for name, share in branches.items() if not name.endswith("_flipped")},
    }
