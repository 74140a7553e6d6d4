"""The taps on a model's routers while any routing context is open.

One Switchboard per model, shared by every context on it. It replaces the routers' `forward`,
watches forwards of the model that contains them, and takes everything off again when the last
context is closed, or, where gradient checkpointing may still recompute a router, when the graphs
of the forwards made inside are gone.
"""

import copy
import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from .gate_weights import FixedWeights
from .recomputation import Recomputations, Served, UsedRoutes, in_backward
from .routed_experts import RecordedRouting, ReplayedRouting
from .router_call import RouterCall
from .statistics import margin
from .taps import RouterTap, survey
from .top_k import top_k

Forward = Callable[..., Any]
Draw = Callable[[int, Tensor], Tensor]
"""`draw(layer_index, logits [N, E]) -> noise [N, E]`."""


class Contexts:
    """The contexts that are open on a model, or listen to one forward of it."""

    def __init__(self) -> None:
        self.recorders: list[RecordedRouting] = []
        self.collectors: list[list[Tensor]] = []
        self.replay: ReplayedRouting | None = None
        self.noise: Draw | None = None

    @property
    def open(self) -> bool:
        """Is there any?"""
        return bool(self.recorders or self.collectors or self.replay or self.noise)


class ModelForward(Contexts):
    """One forward of the model: who listens, and which routes it was served."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.tokens = 0
        self.calls = [0] * num_layers
        self.used = UsedRoutes()

    @property
    def buffers(self) -> list[RecordedRouting]:
        """Every buffer that collects this forward."""
        return self.recorders if self.replay is None else [*self.recorders, self.replay.live]


class Switchboard(Contexts):
    """Taps and state of one model. Opened by `tapped(model)`."""

    def __init__(self, taps: list[RouterTap], backbone: nn.Module) -> None:
        super().__init__()
        for tap in taps:
            # Two switchboards on one router would each take the other for the router itself.
            forward = tap.module.__dict__.get("forward")
            if isinstance(forward, _Tapped) and forward.board.open:
                raise ValueError(
                    f"model: router {tap.name!r} is watched already by a context on "
                    f"{type(forward.board.backbone).__name__}, and this one is opened on "
                    f"{type(backbone).__name__}; open nested contexts on one and the same module"
                )
        self.taps = taps
        self.backbone: nn.Module = backbone
        self._parameters = list(inspect.signature(backbone.forward).parameters)
        self._running: ModelForward | None = None
        self._recomputations = Recomputations(on_gone=self.release)
        self._own_forwards: list[Forward | None] = []
        for layer, tap in enumerate(taps):
            self._own_forwards.append(tap.module.__dict__.get("forward"))
            tap.module.forward = _Tapped(self, layer, tap.module.forward)
        self._handles: list[RemovableHandle] = [
            backbone.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            backbone.register_forward_hook(self._after_forward, always_call=True),
        ]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Switchboard":
        # A copy of the model carries our hooks along; they look at the module and pass it by.
        return self

    @contextmanager
    def hold(self, slot: str, value: ReplayedRouting | Draw) -> Iterator[None]:
        """Set `replay` or `noise`, of which a model can have one, for the length of a block."""
        if getattr(self, slot) is not None:
            raise ValueError(
                f"model: another {slot} context is open on this model; close that context first"
            )
        setattr(self, slot, value)
        try:
            yield
        finally:
            setattr(self, slot, None)

    def call_router(self, layer: int, forward: Forward, args: Any, kwargs: Any) -> Any:
        """A router is called: in a forward of the model, or as a backward recomputes its layer."""
        if self._running is not None:
            return self._route(self._running, layer, forward, args, kwargs)
        tap = self.taps[layer]
        served = self._recomputations.served(layer, tap)
        if served is not None:
            call = RouterCall(tap, ids=served.ids, weigh=served.weights)
            return call.run(forward, args, kwargs)
        if self.open and not in_backward():
            raise ValueError(
                f"model: router {tap.name!r} was called outside of a forward of "
                f"{type(self.backbone).__name__}, so its tokens have no place in a record; call "
                "model(...), not model.forward(...) or a layer by itself, while a routing context "
                "is open"
            )
        return forward(*args, **kwargs)

    def release(self) -> None:
        """Take the taps off, unless a context or a pending recomputation needs them."""
        if self.open:
            return
        self._running = None
        if self._recomputations.pending or not self._handles:
            return
        for tap, own in zip(self.taps, self._own_forwards, strict=True):
            del tap.module.forward
            if own is not None:
                tap.module.forward = own
        for handle in self._handles:
            handle.remove()
        self._handles = []
        _switchboards.pop(self.backbone, None)

    # A forward of the model.

    def _before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if module is not self.backbone:
            return
        self._recomputations.forget_backward()
        self._running = running = ModelForward(len(self.taps))
        if not self.open:
            return
        if in_backward():
            raise ValueError(
                "model: the whole model is called inside a backward pass, as by checkpointing "
                "around it, and what is recomputed has no place in a record; checkpoint its layers "
                "instead: model.gradient_checkpointing_enable()"
            )
        named = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        tokens = named.get("input_ids")
        tokens = named["inputs_embeds"] if tokens is None else tokens
        cache = named.get("past_key_values")
        masked = named.get("attention_mask") is not None  # positions of padding are anything
        batch, length = tokens.shape[:2]
        cached = 0 if cache is None else int(cache.get_seq_length())
        position_ids = None if masked else named.get("position_ids")
        running.tokens = batch * length
        running.noise, running.collectors = self.noise, list(self.collectors)
        # One at a time: should a place be refused, _after_forward undoes those already taken.
        for recorder in self.recorders:
            recorder.cursor.place(batch, length, cached, cache, position_ids)
            running.recorders.append(recorder)
        if self.replay is not None:
            self.replay.live.cursor.place(batch, length, cached, cache, position_ids)
            running.replay = self.replay

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if module is not self.backbone or self._running is None:
            return
        running, self._running = self._running, None
        if output is None:  # the forward raised
            for buffer in running.buffers:
                buffer.cursor.undo()
            return
        if running.buffers and set(running.calls) != {1}:
            calls = {tap.name: n for tap, n in zip(self.taps, running.calls, strict=True) if n != 1}
            raise ValueError(
                f"model: a forward must call each router once, but called {calls} (name: times); "
                "switch layer dropping off, and record modules that share a router one by one"
            )
        for buffer in running.buffers:
            buffer.close(getattr(output, "past_key_values", None))
        self._recomputations.expect(running.used, output)

    # A router inside a forward.

    def _route(
        self, running: ModelForward, layer: int, forward: Forward, args: Any, kwargs: Any
    ) -> Any:
        running.used.enter_router()
        if not running.open:
            return forward(*args, **kwargs)
        running.calls[layer] += 1
        tap, noise = self.taps[layer], running.noise
        live: Tensor | None = None
        weights: Tensor | None = None
        alone: RouterCall | None = None
        fixed = None if running.replay is None else running.replay.fixed_weights(layer)

        def weigh(own: Tensor) -> Tensor:
            nonlocal weights
            weights = own if fixed is None else fixed(own)
            return weights

        def perturb(logits: Tensor) -> Tensor:
            return logits if noise is None else logits + noise(layer, logits)

        def decide(own: Callable[[], Tensor]) -> Tensor:
            nonlocal live
            if noise is None:
                live = own()
            else:
                live = top_k(perturb(call.raw_logits().detach()), tap.top_k).indices
            return _serve(running, layer, tap, live, fixed)

        # The live choice comes first and apart where groups are limited: once the groups of the
        # served ids are opened, the scores of those that the router would have opened are masked
        # away. And where the noisy choice is not the K largest of the noisy logits.
        if (running.replay is not None and tap.num_groups is not None) or (
            noise is not None and not tap.follows_logits
        ):
            alone = RouterCall(tap, perturb=perturb)
            with _apart():
                alone.run(forward, args, kwargs)
            if noise is not None:
                alone.raw_logits()  # without a product there was nothing to perturb
            live = alone.chosen
            assert live is not None
            call = RouterCall(tap, ids=_serve(running, layer, tap, live, fixed))
        elif running.replay is not None or noise is not None:
            call = RouterCall(tap, decide=decide)
        else:
            call = RouterCall(tap)
        if fixed is not None or any(buffer.keeps_weights for buffer in running.buffers):
            call.weigh = weigh
        output = call.run(forward, args, kwargs)
        assert call.chosen is not None
        _require_every_token(running, tap, call.chosen)
        for buffer in running.buffers:
            replaying = running.replay is not None and buffer is running.replay.live
            ids = live if replaying else call.chosen
            assert ids is not None
            logits = call.raw_logits() if buffer.keeps_logits else None
            margins = _margins(tap, alone or call) if buffer.keeps_margins else None
            buffer.keep(layer, ids, logits, weights if buffer.keeps_weights else None, margins)
        for found in running.collectors:
            found.append(call.raw_logits())
        return output


class _Tapped:
    """A router's `forward` while the taps are on; a copy of the model gets the router's own."""

    def __init__(self, board: Switchboard, layer: int, forward: Forward) -> None:
        self.board, self._layer, self._forward = board, layer, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.board.call_router(self._layer, self._forward, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Forward:
        return copy.deepcopy(self._forward, memo)


_switchboards: weakref.WeakKeyDictionary[nn.Module, Switchboard] = weakref.WeakKeyDictionary()


@contextmanager
def tapped(model: nn.Module) -> Iterator[Switchboard]:
    """Open the switchboard of `model` for the length of a block."""
    taps, backbone = survey(model)
    board = _switchboards.get(backbone)
    if board is None:
        board = _switchboards[backbone] = Switchboard(taps, backbone)
    try:
        yield board
    finally:
        board.release()


@contextmanager
def _apart() -> Iterator[None]:
    """A call of a router that leaves nothing behind for the one that counts.

    No saved tensors, which checkpointing counts, and no adapted weight without a gradient, which
    PEFT would keep for the length of a forward.
    """
    cached = parametrize._cache_enabled
    parametrize._cache_enabled = 0
    try:
        with torch.no_grad():
            yield
    finally:
        parametrize._cache_enabled = cached


def _serve(
    running: ModelForward, layer: int, tap: RouterTap, live: Tensor, fixed: FixedWeights | None
) -> Tensor:
    """The ids to choose: those of the record, if one is replayed, and else the live ones."""
    _require_every_token(running, tap, live)
    ids = live if running.replay is None else running.replay.ids(layer, live)
    if running.used.checkpointed:
        running.used.served[layer] = Served(ids, fixed)
    return ids


def _margins(tap: RouterTap, call: RouterCall) -> Tensor:
    """Margins `[..., 1]` of one call; see `RecordedRouting.router_margins`."""
    by_logits = tap.ranks_by_logits and call.logits is not None
    scores = call.logits if by_logits else call.scores
    if scores is None:  # a router with a method of its own
        assert call.chosen is not None
        return torch.full_like(call.chosen[..., :1], torch.nan, dtype=torch.float32)
    return margin(scores, tap.top_k).unsqueeze(-1)


def _require_every_token(running: ModelForward, tap: RouterTap, ids: Tensor) -> None:
    tokens = ids.numel() // tap.top_k
    if tokens != running.tokens:
        raise ValueError(
            f"model: router {tap.name!r} routed {tokens} tokens of a forward of {running.tokens}, "
            "but every router must see every token to be recorded; switch off padding removal and "
            "sequence parallelism"
        )
