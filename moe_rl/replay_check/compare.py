"""How two recorded routings of the same tokens differ: what `moe-rl churn` prints."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from torch import Tensor

from moe_rl.replay_check.check_trace import Record, check_trace, fillers
from moe_rl.routing.routed_experts import NO_RECORD
from moe_rl.routing.statistics import (
    churn,
    disagreement,
    per_layer,
    router_disagreement,
    token_disagreement,
)

MOST_BINS = 16


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Means over the tokens that both traces record; every value is in [0, 1]."""

    tokens: int
    """Tokens with a record in both at some layer."""
    churn: float
    router_disagreement: float
    token_disagreement: float
    by_layer: np.ndarray
    """`[L, 2]`: churn, router disagreement."""
    bins: list[tuple[int, int]]
    """First and last position of each row of `by_position`."""
    by_position: np.ndarray
    """`[bins, 3]`: churn, router and token disagreement."""


def compare(a: Tensor, b: Tensor) -> Comparison:
    """Compare two records `[B, S, L, K]` of the same tokens.

    Raises:
        ValueError: they differ in shape, or no token is recorded in both.
    """
    share = churn(a, b)
    routers, tokens = router_disagreement(share), token_disagreement(share)
    counted = int((~tokens.isnan()).sum())
    if counted == 0:
        raise ValueError("traces: no token has a record in both. Are they of the same tokens?")
    bins = position_bins(a.shape[1])
    rows = [
        [float(x[:, first : last + 1].nanmean()) for x in (share, routers, tokens)]
        for first, last in bins
    ]
    return Comparison(
        tokens=counted,
        **disagreement(share),
        by_layer=np.stack([per_layer(share).numpy(), per_layer(routers).numpy()], axis=1),
        bins=bins,
        by_position=np.array(rows),
    )


def position_bins(length: int) -> list[tuple[int, int]]:
    """First and last position of at most `MOST_BINS` bins over `length` positions."""
    edges = np.linspace(0, length, min(length, MOST_BINS) + 1).astype(int)
    return [(first, last - 1) for first, last in pairwise(edges.tolist())]


def usable(routes: Tensor, path: Path) -> tuple[Tensor, str]:
    """Routes `[B, S, L, K]` in which every row is a choice or -1, and what had to be left out.

    Engines fill rows that they did not record with zeros, or with 0 to K - 1 in every layer. Such a
    row is no choice: counted as one it would agree with every other fill.

    Raises:
        ValueError: begins with `path`; ids that no router can have chosen.
    """
    if not (routes > 0).any():
        raise ValueError(f"{path}: every id is 0 or -1: the engine recorded nothing")
    filled = (routes == 0).all(dim=-1, keepdim=True) & (routes.shape[-1] > 1)
    # The other checks find fills, which are left out here.
    for finding in check_trace(
        routes.masked_fill(filled, NO_RECORD), laws=("ids", "distinct", "gaps")
    ):
        if finding.passed is False:
            raise ValueError(f"{path}: {finding.reason}; moe-rl check-replay shows every check")
    filled = filled | fillers(Record(routes=routes))[..., None, None]
    count = int(filled.sum())
    share = count / filled.numel()
    note = (
        f"{path}: {count} (token, layer) pairs ({share:.1%}) hold zeros or 0..K-1: left out, not "
        "recorded"
    )
    return routes.masked_fill(filled, NO_RECORD), note if count else ""


def describe(result: Comparison) -> str:
    """The tables as text."""
    names = [f"{a}" if a == b else f"{a}-{b}" for a, b in result.bins]
    tables = (
        ("layer       churn  routers", range(len(result.by_layer)), result.by_layer),
        ("position    churn  routers   tokens", names, result.by_position),
    )
    lines = [
        f"{result.tokens} tokens recorded in both",
        f"churn                {result.churn:7.2%}   expert slots of B that A did not choose",
        f"router disagreement  {result.router_disagreement:7.2%}   (token, layer) pairs whose sets "
        "differ",
        f"token disagreement   {result.token_disagreement:7.2%}   tokens with any layer differing; "
        "grows with depth",
    ]
    for heading, keys, table in tables:
        lines += ["", heading]
        for key, values in zip(keys, table, strict=True):
            cells = ("      -" if np.isnan(value) else f"{value:7.2%}" for value in values)
            lines.append(f"{key:<9} {' '.join(cells)}")
    return "\n".join(lines)
