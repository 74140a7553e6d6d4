"""Which branch of the clipped surrogate the gradient comes from.

PPO's surrogate min(w A, clip(w) A) bounds a token with A > 0 and w above the clip range, and one
with A < 0 and w below it. The other two corners pass, and one of them without bound: A < 0 with w
far above 1. Only the gradient that a loss really has tells which tokens move the weights, so that
is what is measured, whatever the loss.
"""

import math

import torch
from torch import Tensor

from moe_rl.metrics.ratios import read

# The token clip range of GRPO (GSPO paper, arXiv 2507.18071, 5.1), for every loss: arms are to be
# compared, and a loss without a clip has branches too.
LOW, HIGH = 0.2, 0.27
SIGNS = ("positive", "negative")
PLACES = ("below", "inside", "above")


def branch_shares(
    gradient: Tensor, log_ratio: Tensor, advantages: Tensor, mask: Tensor, flipped: Tensor
) -> dict[str, float]:
    """Shares of the gradient's mass, sum over tokens of |dL/dlogprob|, by sign of A and place of w.

        branch/SIGN_PLACE           positive: A > 0, negative: A < 0; below: w < 1 - 0.2, above:
                                    w > 1 + 0.27, inside: between; the six add up to 1
        branch/SIGN_PLACE_flipped   the part of it on tokens with a router that chose other experts
        branch/largest_token        the largest single token's share

    All 0 where there is no gradient, NaN where it is infinite.

    Args:
        gradient: [B, T], of the loss in each log-prob, of any scale.
        log_ratio: [B, T], log w, nats.
        advantages: [B, T].
        mask: bool [B, T], response tokens.
        flipped: bool [B, T].
    """
    mass = gradient.double().abs().masked_fill(~mask, 0.0)
    share = mass / mass.sum().clamp(min=torch.finfo(mass.dtype).tiny)
    low, high = log_ratio < math.log1p(-LOW), log_ratio > math.log1p(HIGH)
    places = dict(zip(PLACES, (low, ~(low | high), high), strict=True))
    signs = dict(zip(SIGNS, (advantages > 0, advantages < 0), strict=True))
    values: dict[str, Tensor] = {}
    for sign, of_sign in signs.items():
        for place, at_place in places.items():
            own = share.where(of_sign & at_place, 0.0)
            values[f"branch/{sign}_{place}"] = own.sum()
            values[f"branch/{sign}_{place}_flipped"] = own.where(flipped, 0.0).sum()
    return read(values | {"branch/largest_token": share.amax()}, mask)
