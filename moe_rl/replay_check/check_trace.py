"""Replay check: what can be wrong with recorded routes from elsewhere, seen in the record alone.

Each check is a way in which an engine has handed over wrong routes without saying so; replay would
then train on them in silence.
"""

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from moe_rl.replay_check.check import Finding
from moe_rl.replay_check.check_subject import LawBroken, NotApplicable, require

Where = list[int]


def _recorded(routes: Tensor) -> Tensor:
    return (routes >= 0).all(dim=-1)


def _first(mask: Tensor) -> Where:
    return [int(i) for i in mask.nonzero()[0]]


def trace_ids(routes: Tensor, num_experts: int | None) -> None:
    """Ids in [0, E), or -1."""
    low, high = (int(value) for value in routes.aminmax())
    require(low >= -1, f"an id of {low}; only -1 may be negative")
    if num_experts is not None:
        require(high < num_experts, f"an id of {high} for {num_experts} experts")


def trace_distinct(routes: Tensor, num_experts: int | None) -> None:
    """The K ids of a token differ."""
    ordered = routes.sort(dim=-1).values
    twice = (ordered.diff(dim=-1) == 0).any(dim=-1) & _recorded(routes)
    # Rows of nothing but zeros have a check of their own.
    twice &= ~(routes == 0).all(dim=-1)
    if routes.shape[-1] == 1:
        raise NotApplicable("one expert a token")
    if bool(twice.any()):
        at = _first(twice)
        raise LawBroken(f"[b, s, l] = {at} names an expert twice: {routes[tuple(at)].tolist()}")


def trace_zeros(routes: Tensor, num_experts: int | None) -> None:
    """Not everything is expert 0: an engine that recorded nothing hands over zeros."""
    require(bool((routes > 0).any()), "every recorded id is 0 or -1: the engine recorded nothing")
    # With one expert a token a layer of zeros may be true; all layers at once are a fill.
    zero = (routes == 0).all(dim=-1) & (routes.shape[-1] > 1)
    share = zero.flatten(0, 1).float().mean(dim=0)
    layers = [layer for layer, value in enumerate(share.tolist()) if value == 1]
    require(
        not layers,
        f"layers {layers} are all zeros: dense layers, if the record holds every decoder layer "
        "(fit_to_model drops them), else layers that were not recorded",
    )


def trace_last_token(routes: Tensor, num_experts: int | None) -> None:
    """No token is filled with zeros; the last one, which is never fed, is where it happens."""
    filled = (routes == 0).all(dim=-1).all(dim=-1)
    if not bool(filled.any()):
        return
    b, s = _first(filled)
    count = int(filled.sum())
    raise LawBroken(
        f"{count} tokens are zeros in every layer, the first at [b, s] = [{b}, {s}]: rows without "
        "a route (the last token, padding) must hold -1, or expert 0 gets load that it never had"
    )


def trace_gaps(routes: Tensor, num_experts: int | None) -> None:
    """A token at a layer has K ids or none."""
    some = (routes >= 0).any(dim=-1) & ~_recorded(routes)
    if bool(some.any()):
        at = _first(some)
        raise LawBroken(f"[b, s, l] = {at} has some ids only: {routes[tuple(at)].tolist()}")
    require(bool(_recorded(routes).any()), "no token has a record")


def trace_layers(routes: Tensor, num_experts: int | None) -> None:
    """No two layers are copies of each other."""
    known = _recorded(routes).all(dim=-1)
    tokens = routes[known].sort(dim=-1).values
    if tokens.shape[0] < 4:
        raise NotApplicable("fewer than four tokens with every layer")
    for a in range(tokens.shape[1]):
        for b in range(a + 1, tokens.shape[1]):
            copied = torch.equal(tokens[:, a], tokens[:, b]) and bool((tokens[:, a] != 0).any())
            everything = num_experts == routes.shape[-1]  # a dense control uses all experts
            require(not copied or everything, f"layer {b} is a copy of layer {a}")


def trace_tokens(routes: Tensor, num_experts: int | None) -> None:
    """Tokens do not all go to the same experts."""
    known = _recorded(routes).all(dim=-1)
    tokens = routes[known].sort(dim=-1).values
    if tokens.shape[0] < 4 or num_experts == routes.shape[-1]:
        raise NotApplicable("fewer than four tokens, or every expert is always on")
    require(
        bool((tokens != tokens[:1]).any()),
        "every token goes to the same experts in every layer: one row was written over and over",
    )


TRACE_LAWS: dict[str, Callable[[Tensor, int | None], None]] = {
    "ids": trace_ids,
    "distinct": trace_distinct,
    "zeros": trace_zeros,
    "last token": trace_last_token,
    "gaps": trace_gaps,
    "layers": trace_layers,
    "tokens": trace_tokens,
}


def check_trace(
    routed_experts: Tensor,
    *,
    num_experts: int | None = None,
    laws: Collection[str] = tuple(TRACE_LAWS),
) -> list[Finding]:
    """Check recorded routes from elsewhere before they are replayed.

    Args:
        routed_experts: `[B, S, L, K]` as `read_trace` returns it.
        num_experts: E, None where it is not known; ids are then bounded by nothing.
        laws: keys of `TRACE_LAWS`; all by default.

    Raises:
        ValueError: not an integer tensor of four axes, or an empty one.
    """
    if (
        routed_experts.ndim != 4
        or routed_experts.is_floating_point()
        or routed_experts.numel() == 0
    ):
        raise ValueError(
            f"routed_experts: {routed_experts.dtype} {list(routed_experts.shape)}. Pass integer "
            "ids [B, S, L, K] of at least one token."
        )
    return [_find(name, TRACE_LAWS[name], routed_experts, num_experts) for name in laws]


def _find(
    name: str, law: Callable[[Tensor, int | None], None], routes: Tensor, num_experts: int | None
) -> Finding:
    try:
        law(routes, num_experts)
    except NotApplicable as why:
        return Finding(check=name, passed=None, reason=str(why))
    except LawBroken as broken:
        return Finding(check=name, passed=False, reason=str(broken))
    return Finding(check=name, passed=True, reason="")
