"""Replay check: what can be wrong with routes recorded elsewhere, seen in the record alone.

Each check is a way in which an engine has handed over wrong routes without any error.
"""

from collections.abc import Callable, Collection
from itertools import combinations

import torch
from torch import Tensor

from moe_rl.replay_check.check_subject import sort_ids
from moe_rl.replay_check.claims import Claims, LawResult, judge_law

MIN_TOKENS = 4
"""Fewer tokens may agree by chance."""


def _recorded(routes: Tensor) -> Tensor:
    return (routes >= 0).all(dim=-1)


def _none_of(mask: Tensor, what: str, routes: Tensor) -> tuple[bool, str]:
    """The claim that `mask` `[B, S, L]` is nowhere true; the first place where it is, if not."""
    for at in mask.nonzero()[:1].tolist():
        return False, f"[b, s, l] = {at} {what}: {routes[tuple(at)].tolist()}"
    return True, ""


def trace_ids(routes: Tensor, num_experts: int | None) -> Claims:
    """Ids in [0, E), or -1."""
    low, high = (int(value) for value in routes.aminmax())
    yield low >= -1, f"an id of {low}; only -1 may be negative"
    in_range = num_experts is None or high < num_experts
    yield in_range, f"an id of {high} for {num_experts} experts"


def trace_distinct(routes: Tensor, num_experts: int | None) -> Claims:
    """The K ids of a token differ."""
    if routes.shape[-1] == 1:
        yield None, "one expert per token"
        return
    twice = (sort_ids(routes).diff(dim=-1) == 0).any(dim=-1) & _recorded(routes)
    twice &= ~(routes == 0).all(dim=-1)  # rows of zeros have a check of their own
    yield _none_of(twice, "names an expert twice", routes)


def trace_zeros(routes: Tensor, num_experts: int | None) -> Claims:
    """Not everything is expert 0: an engine that recorded nothing hands over zeros."""
    yield bool((routes > 0).any()), "every recorded id is 0 or -1: the engine recorded nothing"
    # With one expert per token a layer of zeros may be true; all layers at once are a fill.
    zero = (routes == 0).all(dim=-1).flatten(0, 1).all(dim=0) & (routes.shape[-1] > 1)
    yield (
        not bool(zero.any()),
        f"layers {zero.nonzero().flatten().tolist()} are all zeros: dense layers, if the record "
        "holds every decoder layer (fit_to_model drops them), else layers that were not recorded",
    )


def trace_last_token(routes: Tensor, num_experts: int | None) -> Claims:
    """No token is filled with zeros; the last one, which is never fed, is where it happens."""
    filled = (routes == 0).flatten(2).all(dim=-1).nonzero().tolist()
    yield (
        not filled,
        f"{len(filled)} tokens are zeros in every layer, the first at [b, s] = "
        f"{(filled or [[]])[0]}: rows without a route (the last token, padding) must hold -1, or "
        "expert 0 gets load that it never had",
    )


def trace_gaps(routes: Tensor, num_experts: int | None) -> Claims:
    """A token at a layer has K ids or none."""
    some = (routes >= 0).any(dim=-1) & ~_recorded(routes)
    yield _none_of(some, "has some ids only", routes)
    yield bool(_recorded(routes).any()), "no token has a record"


def trace_layers(routes: Tensor, num_experts: int | None) -> Claims:
    """No two layers are copies of each other."""
    tokens = sort_ids(routes[_recorded(routes).all(dim=-1)])
    if tokens.shape[0] < MIN_TOKENS:
        yield None, "fewer than four tokens with every layer"
        return
    dense = num_experts == routes.shape[-1]  # a dense control uses every expert in every layer
    for a, b in combinations(range(tokens.shape[1]), 2):
        copied = torch.equal(tokens[:, a], tokens[:, b]) and bool((tokens[:, a] != 0).any())
        yield dense or not copied, f"layer {b} is a copy of layer {a}"


def trace_tokens(routes: Tensor, num_experts: int | None) -> Claims:
    """Tokens do not all go to the same experts."""
    tokens = sort_ids(routes[_recorded(routes).all(dim=-1)])
    if tokens.shape[0] < MIN_TOKENS or num_experts == routes.shape[-1]:
        yield None, "fewer than four tokens, or every expert is always on"
        return
    yield (
        bool((tokens != tokens[:1]).any()),
        "every token goes to the same experts in every layer: one row was written over and over",
    )


TRACE_LAWS: dict[str, Callable[[Tensor, int | None], Claims]] = {
    "ids": trace_ids,
    "distinct": trace_distinct,
    "zeros": trace_zeros,
    "last token": trace_last_token,
    "gaps": trace_gaps,
    "layers": trace_layers,
    "tokens": trace_tokens,
}


def check_trace(
    routed_experts: Tensor, *, num_experts: int | None = None, laws: Collection[str] = TRACE_LAWS
) -> list[LawResult]:
    """Check routes recorded elsewhere before they are replayed.

    Args:
        routed_experts: `[B, S, L, K]` as `read_trace` returns it.
        num_experts: E; None where it is unknown: ids then have no upper bound.
        laws: keys of `TRACE_LAWS`.

    Raises:
        ValueError: not an integer tensor of four axes, or an empty one.
    """
    routes = routed_experts
    if routes.ndim != 4 or routes.is_floating_point() or routes.numel() == 0:
        raise ValueError(
            f"routed_experts: {routes.dtype} {list(routes.shape)}; pass integer ids [B, S, L, K] "
            "of at least one token"
        )
    return [judge_law(name, TRACE_LAWS[name](routes, num_experts)) for name in laws]
