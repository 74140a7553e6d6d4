"""Gradient checkpointing recomputes routers, and must get the routes of the forward.

A router call outside a forward of the model is a recomputation. It is never recorded, and is
answered with the ids and gate weights that the forward being recomputed was served. A gradient hook
on that forward's outputs tells which it is: backward passes through them before it reaches a layer.
The hooks also hold the routes, so these live as long as the graph and no longer.

State lives on plain attributes, because on CUDA recomputation runs in threads of the autograd
engine, where ContextVars and thread-locals are empty.
"""

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .gate_weights import FixedWeights
from .taps import RouterTap


def in_backward() -> bool:
    """Whether this thread is inside a backward pass."""
    return bool(torch._C._current_graph_task_id() != -1)


class Served(NamedTuple):
    """What one router of a forward was answered with."""

    ids: Tensor
    weights: FixedWeights | None


class UsedRoutes:
    """The routes that one forward was served, kept where a backward may recompute its routers."""

    def __init__(self) -> None:
        self.with_grad = torch.is_grad_enabled()
        self.checkpointed = False
        self.served: dict[int, Served] = {}
        self.backward: int | None = None
        self.recomputed: set[int] = set()

    def enter_router(self) -> None:
        """Notice, from inside a router of the forward, that its layer is under checkpointing.

        Reentrant checkpointing turns gradients off around the layer, the other kind sets hooks
        for saved tensors. Offloading of activations sets them too; then routes are kept in vain.
        """
        if self.with_grad and not self.checkpointed:
            hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
            self.checkpointed = not torch.is_grad_enabled() or hooks is not None


class Recomputations:
    """The forwards of one model whose routers a backward may still recompute.

    Whenever the graph of one of them is gone, `on_gone` is called.
    """

    def __init__(self, on_gone: Callable[[], None]) -> None:
        self.pending = 0
        self._on_gone = on_gone
        self._begun: weakref.ref[UsedRoutes] | None = None

    def expect(self, used: UsedRoutes, output: Any) -> None:
        """Be ready for a backward through `output`, what a forward has returned."""
        if not used.checkpointed:
            return
        # Live forwards get hooks too, or theirs would pass for a replayed forward's recomputation.
        reached = [tensor for tensor in _tensors(output) if tensor.requires_grad]
        for tensor in reached:
            tensor.register_hook(functools.partial(self._begin, used))
        if reached and used.served:
            self.pending += 1
            weakref.finalize(used, self._gone).atexit = False

    def forget_backward(self) -> None:
        """No backward is under way: a forward begins, or the backward has ended."""
        self._begun = None

    def served(self, layer: int, tap: RouterTap) -> Served | None:
        """What the router of `layer`, being recomputed, was served; None for its own choice."""
        used = None if self._begun is None else self._begun()
        if used is None or not used.served:
            return None
        if layer in used.recomputed:
            raise ValueError(
                f"model: router {tap.name!r} is recomputed twice in one backward pass, so two "
                "checkpointed forwards share it and their routes cannot be told apart (one was "
                "made before the routing context, or on another device); call backward for each "
                "forward by itself"
            )
        used.recomputed.add(layer)
        return used.served[layer]

    def _begin(self, used: UsedRoutes, grad: Tensor) -> None:
        task = torch._C._current_graph_task_id()
        if used.backward != task:
            used.backward = task
            used.recomputed.clear()
            torch.autograd.Variable._execution_engine.queue_callback(self.forget_backward)
        self._begun = weakref.ref(used)

    def _gone(self) -> None:
        self.pending -= 1
        self._on_gone()


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)
