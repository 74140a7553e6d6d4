"""Replay check: what the experts of a model are really called with, seen without any tap.

The independent witness of `check.py`: ids and gate weights where they are used, at the door of the
experts, whatever the router and the taps say.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from moe_rl.routing.taps import RouterTap

Seen = dict[int, tuple[Tensor, Tensor]]


@contextlib.contextmanager
def watch_experts(model: nn.Module, taps: list[RouterTap]) -> Iterator[Seen]:
    """Collect `layer -> (ids [N, K], weights [N, K])` of the last forward in the block.

    A layer whose experts are not called with ids and weights is missing.
    """
    seen: Seen = {}
    names = dict(model.named_modules())
    paths = {id(module): name for name, module in names.items()}
    handles = []
    for layer, tap in enumerate(taps):
        read = READERS.get(type(tap.module).__name__)
        if read is not None:
            handles.append(tap.module.register_forward_hook(_from_router(seen, layer, tap, read)))
            continue
        block = paths[id(tap.module)]
        experts = names.get(f"{block}.experts") or names.get(
            f"{block.rpartition('.')[0]}.experts".lstrip(".")
        )
        if experts is not None and experts is not tap.module:
            handles.append(
                experts.register_forward_pre_hook(_at_the_door(seen, layer, tap), with_kwargs=True)
            )
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _at_the_door(seen: Seen, layer: int, tap: RouterTap) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        pairs = [
            value
            for value in (*args, *kwargs.values())
            if isinstance(value, Tensor) and value.ndim == 2 and value.shape[1] == tap.top_k
        ]
        ids = [value for value in pairs if not value.is_floating_point()]
        # The hidden states come before the weights, and may have their shape.
        weights = [value for value in pairs if value.is_floating_point()]
        if ids and weights:
            seen[layer] = ids[0].detach().long(), weights[-1].detach()

    return hook


def _from_router(
    seen: Seen, layer: int, tap: RouterTap, read: Callable[[Any, RouterTap], tuple[Tensor, Tensor]]
) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        seen[layer] = read(output, tap)

    return hook


def _llama4(output: Any, tap: RouterTap) -> tuple[Tensor, Tensor]:
    """Scores `[N, E]` that are 0 at experts not chosen; every expert sees every token."""
    weights, ids = output[0].detach().topk(tap.top_k, dim=-1)
    return ids, weights


def _jetmoe(output: Any, tap: RouterTap) -> tuple[Tensor, Tensor]:
    """Assignments sorted by expert: their place (n * K + k), their weight, tokens an expert."""
    places, _, gates, counts = output[:4]
    experts = places.new_tensor([e for e, count in enumerate(counts) for _ in range(count)])
    ids, weights = places.new_empty(places.shape), gates.detach().new_empty(gates.shape)
    ids[places], weights[places] = experts, gates.detach()
    return ids.view(-1, tap.top_k), weights.view(-1, tap.top_k)


READERS = {"Llama4Router": _llama4, "JetMoeTopKGating": _jetmoe}
