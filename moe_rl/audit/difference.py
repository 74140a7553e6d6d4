"""What two readings of the same tokens with the same weights differ in.

Shapes: B sequences (G neighbours to a prompt), T response positions, L MoE layers, K experts a
token. A reading is what one pass says of the response tokens; the first of two, the reference, is
the one whose tokens they are.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_rl.metrics.ratios import mismatch_statistics
from moe_rl.replay_check.compare import position_bins
from moe_rl.routing.statistics import churn, disagreement, per_layer, router_disagreement


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One pass over the response tokens of a rollout."""

    logprobs: Tensor
    """float32 [B, T], nats."""
    routes: Tensor
    """int16 [B, T, L, K] where each response token is predicted, -1 without a record."""


@dataclass(frozen=True, kw_only=True)
class Distance:
    """How far two readings' log-probs are from each other, over response tokens."""

    kl_k1: float
    """Mean of log mu - log pi, mu being the reference: KL(mu || pi), nats a token."""
    kl_k3: float
    """Mean of pi/mu - 1 - log(pi/mu): the same with less variance, nats a token, >= 0."""
    kl_k3_error: float
    """Standard error of `kl_k3` over prompts (jackknife), nats a token."""
    extreme_2: float
    """F(2): share of tokens whose probabilities differ by more than a factor of 2."""
    largest: float
    """Largest |log mu - log pi|, nats."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What a reading changes against the reference."""

    tokens: int
    """Response tokens compared."""
    not_finite: float
    """Share of response tokens whose log-prob is NaN or inf; they are left out of all else."""
    churn: float
    """Share of expert slots that differ."""
    router_disagreement: float
    """Share of (token, layer) pairs whose expert sets differ."""
    token_disagreement: float
    """Share of tokens with at least one such layer."""
    live: Distance
    """Each reading by its own routes."""
    replayed: Distance | None
    """Both by the same routes; None where no router differs, or where this was not read."""
    routers_by_layer: Sequence[float]
    """[L] router disagreement."""
    routers_by_position: Sequence[tuple[int, int, float]]
    """First and last response position of a bin, and its router disagreement."""
    flips_by_margin: Sequence[tuple[float, float]]
    """The reference's median router margin in each tenth of its (token, layer) pairs, from the
    smallest margins up, and the share of them whose sets differ. Empty where it has no margins."""

    @property
    def removed(self) -> float:
        """Share of `live.kl_k3` that is gone when both take the same routes; NaN if unknown."""
        if self.replayed is None or self.live.kl_k3 <= 0:
            return math.nan
        return 1 - self.replayed.kl_k3 / self.live.kl_k3


def compare_readings(
    reference: Reading,
    other: Reading,
    mask: Tensor,
    *,
    group_size: int,
    same_routes: tuple[Reading, Reading] | None = None,
    margins: Tensor | None = None,
) -> Difference:
    """Compare two readings over the response tokens of `mask`, bool [B, T].

    Args:
        same_routes: the two readings once more, one of them replaying the other's routes.
        margins: float32 [B, T, L], the reference's router margins.
    """
    finite = mask.clone()
    for reading in (reference, other, *(same_routes or ())):
        finite &= reading.logprobs.isfinite()
    moved = churn(reference.routes, other.routes, finite)
    routers = router_disagreement(moved)
    counted = int(mask.sum())
    return Difference(
        tokens=counted,
        not_finite=1 - int(finite.sum()) / max(counted, 1),
        **disagreement(moved),
        live=_distance(reference, other, finite, group_size),
        replayed=None if same_routes is None else _distance(*same_routes, finite, group_size),
        routers_by_layer=per_layer(routers).tolist(),
        routers_by_position=_by_position(routers),
        flips_by_margin=[] if margins is None else _by_margin(routers, margins),
    )


def _distance(mu: Reading, pi: Reading, mask: Tensor, group_size: int) -> Distance:
    found = mismatch_statistics(pi.logprobs, mu.logprobs, mask)
    log_ratio = (pi.logprobs.double() - mu.logprobs.double()).masked_fill(~mask, 0.0)
    k3 = log_ratio.expm1() - log_ratio
    # Responses to one prompt are alike: a prompt is the unit that was drawn.
    sums, counts = (
        values.sum(1).view(-1, group_size).sum(1).double() for values in (k3, mask.double())
    )
    left_out = (sums.sum() - sums) / (counts.sum() - counts)
    spread = (left_out - left_out.mean()).square().mean() * (len(sums) - 1)
    return Distance(
        kl_k1=found["mismatch/kl_k1"],
        kl_k3=found["mismatch/kl_k3"],
        kl_k3_error=float(spread.sqrt()) if len(sums) > 1 else math.nan,
        extreme_2=found["mismatch/extreme_2"],
        largest=float(log_ratio.abs().max()) if mask.any() else math.nan,
    )


def _by_position(routers: Tensor) -> list[tuple[int, int, float]]:
    """Router disagreement [B, T, L] by response position."""
    bins = position_bins(routers.shape[1])
    return [(a, b, float(routers[:, a : b + 1].nanmean())) for a, b in bins]


def _by_margin(routers: Tensor, margins: Tensor) -> list[tuple[float, float]]:
    known = ~routers.isnan() & margins.isfinite()
    order = margins[known].argsort(stable=True)
    if len(order) < 10:
        return []
    values, flips = margins[known][order], routers[known][order]
    return [
        (float(v.median()), float(f.mean()))
        for v, f in zip(torch.tensor_split(values, 10), torch.tensor_split(flips, 10), strict=True)
    ]
