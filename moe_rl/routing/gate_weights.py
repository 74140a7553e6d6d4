"""Gate weights: find them in what a router returns, and put recorded ones in their place.

A gate weight is what one chosen expert counts with: the number that its output is multiplied by
(Llama 4: its input), behind every softmax, normalisation, bias and scale of the router. What comes
after the sum over experts (the scale of MiniMax-M3) is no part of it.

Only contexts that record or replay gate weights look at what a router returns. Its ids and gate
weights stand side by side in all families but two, whose layouts are written down here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .taps import RouterTap

Found = tuple[Tensor, Callable[[Tensor], Any]]
"""The gate weights `[N, K]` of a router's output, and the output with others instead."""

NO_GATE_WEIGHTS = {
    "InklingTopkRouter": "weights its shared experts too, so that the gate weights of the chosen "
    "experts alone do not determine what the layer returns",
}


@dataclass(frozen=True, kw_only=True)
class FixedWeights:
    """Recorded gate weights of the tokens of one router call."""

    weights: Tensor
    """float `[N, K]`, in the order of the recorded ids; anything where nothing is recorded."""
    recorded: Tensor
    """bool `[N, 1]`, False for tokens that are routed live."""

    def __call__(self, live: Tensor) -> Tensor:
        """The weights `[N, K]` to use, given the router's own.

        The router stays in the graph and gets a gradient of exactly 0 from recorded tokens: DDP
        waits for a gradient of every parameter.
        """
        return torch.where(self.recorded.to(live.device), self.weights.to(live), live)


def check_has_gate_weights(taps: list[RouterTap]) -> None:
    """Raise ValueError for routers whose gate weights do not say all that they decide."""
    for tap in taps:
        reason = NO_GATE_WEIGHTS.get(type(tap.module).__name__)
        if reason is not None:
            raise ValueError(f"gate_weights: router {tap.name!r} {reason}; leave gate_weights out")


def check_gate_weights(gate_weights: Tensor, routed_experts: Tensor, *, finite: bool) -> None:
    """Raise ValueError unless `gate_weights` are float weights of the shape of the ids.

    Args:
        finite: check too that they are finite wherever the K ids of a token are recorded.
    """
    if gate_weights.shape != routed_experts.shape or not gate_weights.is_floating_point():
        raise ValueError(
            f"gate_weights: shape is {list(gate_weights.shape)} of {gate_weights.dtype}; pass one "
            f"float weight for each id of routed_experts, {list(routed_experts.shape)}"
        )
    if finite:
        recorded = (routed_experts >= 0).all(dim=-1, keepdim=True).to(gate_weights.device)
        bad = (recorded & ~gate_weights.isfinite()).nonzero()
        if len(bad):
            b, s, layer, _ = bad[0].tolist()
            raise ValueError(
                f"gate_weights: [{b}, {s}, {layer}] holds {gate_weights[b, s, layer].tolist()}, "
                "but its ids are recorded; pass finite weights, or ids of -1 where there is no "
                "record"
            )


def find_gate_weights(
    tap: RouterTap, output: Any, ids: Tensor, logits: Tensor | None = None
) -> Found:
    """Find the gate weights of the chosen `ids` `[..., K]` in the `output` of a router.

    Args:
        logits: the router's raw logits, which are no gate weights though E = K gives them the
            shape.

    Raises:
        ValueError: no float tensor of the shape of the ids stands beside ids in the output.
    """
    find = _LAYOUTS.get(type(tap.module).__name__)
    if find is not None:
        return find(output, ids.reshape(-1, tap.top_k))
    parts = list(output) if isinstance(output, tuple | list) else []
    for place in (place for place, part in enumerate(parts) if _like(ids, part, floats=False)):
        for near in (place - 1, place + 1):
            found = parts[near] if 0 <= near < len(parts) else None
            if _like(ids, found, floats=True) and found is not logits:
                return _part(output, near, tap.top_k)
    raise ValueError(
        f"gate_weights: router {tap.name!r} ({type(tap.module).__name__}) returns no weights "
        f"[..., {tap.top_k}] beside its ids, so they can be neither recorded nor replayed; let it "
        "return them side by side, or leave gate_weights out"
    )


def _like(ids: Tensor, part: Any, *, floats: bool) -> bool:
    """Whether a part of an output is a tensor `[..., K]` of all tokens: of ids, or of floats."""
    return (
        isinstance(part, Tensor)
        and part.is_floating_point() == floats
        and part.shape[-1:] == ids.shape[-1:]
        and part.numel() == ids.numel()
    )


def _part(output: Any, place: int, top_k: int) -> Found:
    weights: Tensor = output[place]

    def put(new: Tensor) -> Any:
        parts = [*output[:place], new.view(weights.shape), *output[place + 1 :]]
        return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)

    return weights.reshape(-1, top_k), put


def _llama4(output: Any, ids: Tensor) -> Found:
    """Scores `[N, E]` that are 0 at experts not chosen; every expert sees every token."""
    scores, *rest = output

    def put(new: Tensor) -> Any:
        return (torch.zeros_like(scores).scatter(-1, ids, new), *rest)

    return scores.gather(-1, ids), put


def _jetmoe(output: Any, ids: Tensor) -> Found:
    """Assignments sorted by expert: their place n * K + k, their token, and their weight."""
    places, tokens, gates, *rest = output

    def put(new: Tensor) -> Any:
        return (places, tokens, new.flatten()[places], *rest)

    return gates[places.argsort()].view(ids.shape), put


_LAYOUTS: dict[str, Callable[[Any, Tensor], Found]] = {
    "Llama4Router": _llama4,
    "JetMoeTopKGating": _jetmoe,
}
