"""Replay check: the ids and gate weights that experts are called with, whatever the taps say."""

import contextlib
import functools
from collections.abc import Iterator
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

    def note(
        layer: int, read: Any, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
    ) -> None:
        found = read((*args, *kwargs.values()), output, taps[layer].top_k)
        if found is not None:
            seen[layer] = found

    for layer, tap in enumerate(taps):
        module: Any = tap.module
        read = READERS.get(type(tap.module).__name__)
        if read is None:
            block = paths[id(tap.module)]
            beside = f"{block.rpartition('.')[0]}.experts".lstrip(".")
            read, module = _call, names.get(f"{block}.experts") or names.get(beside)
            if module is None or module is tap.module:
                continue
        hook = functools.partial(note, layer, read)
        handles.append(module.register_forward_hook(hook, with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _call(inputs: tuple[Any, ...], output: Any, top_k: int) -> tuple[Tensor, Tensor] | None:
    """Ids and weights among the arguments of a block of experts."""
    pairs = [x for x in inputs if isinstance(x, Tensor) and x.ndim == 2 and x.shape[1] == top_k]
    ids = [value for value in pairs if not value.is_floating_point()]
    # The hidden states come before the weights, and may have their shape.
    weights = [value for value in pairs if value.is_floating_point()]
    return (ids[0].detach().long(), weights[-1].detach()) if ids and weights else None


def _llama4(inputs: tuple[Any, ...], output: Any, top_k: int) -> tuple[Tensor, Tensor]:
    """Scores `[N, E]` that are 0 at experts not chosen; every expert sees every token."""
    weights, ids = output[0].detach().topk(top_k, dim=-1)
    return ids, weights


def _jetmoe(inputs: tuple[Any, ...], output: Any, top_k: int) -> tuple[Tensor, Tensor]:
    """Assignments sorted by expert: their place (n * K + k), their weight, tokens an expert."""
    places, _, gates, counts = output[:4]
    experts = places.new_tensor([e for e, count in enumerate(counts) for _ in range(count)])
    ids, weights = places.new_empty(places.shape), gates.detach().new_empty(gates.shape)
    ids[places], weights[places] = experts, gates.detach()
    return ids.view(-1, top_k), weights.view(-1, top_k)


READERS: dict[str, Any] = {"Llama4Router": _llama4, "JetMoeTopKGating": _jetmoe}
