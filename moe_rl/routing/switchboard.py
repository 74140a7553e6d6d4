"""Routing room: the taps on a model's routers while any routing context is open.

One Switchboard a model, shared by every context on it. It replaces the routers' `forward`,
watches forwards of the model that contains them, and takes everything off again when the last
context is closed, or, where gradient checkpointing may still recompute a router, when the graphs
of the forwards made inside are gone.
"""

import copy
import inspect
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from .recomputation import Recomputations, UsedRoutes, in_backward
from .routed_experts import Cursor, RoutingBuffer, Span
from .router_call import RouterCall
from .taps import RouterTap, survey

Forward = Callable[..., Any]


class Replays(Protocol):
    """What the switchboard asks of a replay."""

    cursor: Cursor
    live: RoutingBuffer

    def ids(self, layer: int, span: Span, live: Tensor) -> Tensor:
        """Ids of the shape of `live` to serve: recorded, and live where there is no record."""
        ...


class Perturbs(Protocol):
    """What the switchboard asks of router noise."""

    def choose(self, layer: int, tap: RouterTap, scores: Tensor, logits: Tensor | None) -> Tensor:
        """Ids `[..., K]` of the perturbed choice of a router that follows its logits."""
        ...

    def perturb(self, layer: int, tap: RouterTap, logits: Tensor) -> Tensor:
        """Logits with noise, for a router that makes its choice from them by itself."""
        ...


class Recorder:
    """A buffer with its own place in the stream of forwards."""

    def __init__(self, buffer: RoutingBuffer) -> None:
        self.buffer = buffer
        self.cursor = Cursor()


class Pass:
    """One forward of the model: who listens, and which ids it used."""

    def __init__(self) -> None:
        self.tokens = 0
        self.recorders: list[tuple[Recorder, Span]] = []
        self.replay: tuple[Replays, Span] | None = None
        self.noise: Perturbs | None = None
        self.used = UsedRoutes()

    @property
    def listening(self) -> bool:
        """Does any context want to know about this forward?"""
        return bool(self.recorders) or self.replay is not None or self.noise is not None

    def listeners(self) -> Iterator[tuple[RoutingBuffer, Cursor, Span]]:
        """Every buffer that collects this forward, and its place there."""
        for recorder, span in self.recorders:
            yield recorder.buffer, recorder.cursor, span
        if self.replay is not None:
            replay, span = self.replay
            yield replay.live, replay.cursor, span


class Switchboard:
    """Taps and state of one model. Opened by `tapped(model)`."""

    def __init__(self, taps: list[RouterTap], backbone: nn.Module) -> None:
        for tap in taps:
            _require_no_other(tap, backbone)
        self.taps = taps
        self.backbone = backbone
        self.recorders: list[Recorder] = []
        self.replay: Replays | None = None
        self.noise: Perturbs | None = None
        self._parameters = list(inspect.signature(backbone.forward).parameters)
        self._running: Pass | None = None
        self._recomputations = Recomputations(on_gone=self.release)
        self._handles: list[RemovableHandle] = []
        self._own_forwards: list[Forward | None] = []
        self._install()

    def _install(self) -> None:
        for layer, tap in enumerate(self.taps):
            self._own_forwards.append(tap.module.__dict__.get("forward"))
            tap.module.forward = _Tapped(self, layer, tap.module.forward)
        self._handles = [
            self.backbone.register_forward_pre_hook(_Watch(self._before_forward), with_kwargs=True),
            self.backbone.register_forward_hook(_Watch(self._after_forward), always_call=True),
        ]

    @property
    def open(self) -> bool:
        """Is a context open on this model?"""
        return bool(self.recorders or self.replay or self.noise)

    def call_router(self, layer: int, forward: Forward, args: Any, kwargs: Any) -> Any:
        """A router is called: in a forward of the model, or as a backward recomputes its layer."""
        if self._running is not None:
            return self._route(self._running, layer, forward, args, kwargs)
        tap = self.taps[layer]
        ids = self._recomputations.ids(layer, tap)
        if ids is not None:
            return RouterCall(tap, ids=ids).run(forward, args, kwargs)
        if self.open and not in_backward():
            raise ValueError(
                f"model: router {tap.name!r} was called outside of a forward of "
                f"{type(self.backbone).__name__}, so its tokens have no place in a record. Call "
                "model(...), not model.forward(...) or a layer by itself, while a routing context "
                "is open."
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
            if own is None:
                del tap.module.forward
            else:
                tap.module.forward = own
        for handle in self._handles:
            handle.remove()
        self._handles = []
        _switchboards.pop(self.backbone, None)

    # A forward of the model.

    def _before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._recomputations.forget_backward()
        self._running = running = Pass()
        if not self.open:
            return
        if in_backward():
            raise ValueError(
                "model: the whole model is called inside a backward pass, as by checkpointing "
                "around it, and what is recomputed has no place in a record. Checkpoint its layers "
                "instead: model.gradient_checkpointing_enable()."
            )
        named = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        batch, length = _batch_and_length(named)
        cache = named.get("past_key_values")
        cached = 0 if cache is None else int(cache.get_seq_length())
        running.tokens = batch * length
        running.noise = self.noise
        # One at a time: should a place be refused, _after_forward undoes those already taken.
        where: dict[str, Any] = {
            "batch": batch,
            "length": length,
            "cached": cached,
            "cache": cache,
        }
        for recorder in self.recorders:
            span = recorder.cursor.place(**where)
            running.recorders.append((recorder, span))
        if self.replay is not None:
            span = self.replay.cursor.place(**where)
            if named.get("attention_mask") is None:  # with one, positions of padding are anything
                self.replay.cursor.check_packed(span, named.get("position_ids"))
            running.replay = (self.replay, span)
        for buffer, _, span in running.listeners():
            buffer.open(span)

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        running, self._running = self._running, None
        if running is None:
            return
        if output is None:  # the forward raised
            for _, cursor, _ in running.listeners():
                cursor.undo()
            return
        cache = getattr(output, "past_key_values", None)
        for buffer, cursor, span in running.listeners():
            missing = [self.taps[layer].name for layer in buffer.missing()]
            if missing:
                raise ValueError(
                    f"model: the forward did not call the routers {', '.join(missing)}. A record "
                    "needs every MoE layer; switch layer dropping off."
                )
            buffer.close(span)
            cursor.own(cache, span)
        self._recomputations.expect(running.used, output)

    # A router inside a forward.

    def _route(self, running: Pass, layer: int, forward: Forward, args: Any, kwargs: Any) -> Any:
        running.used.enter_router()
        if not running.listening:
            return forward(*args, **kwargs)
        tap = self.taps[layer]
        live: Tensor | None = None

        def decide(scores: Tensor, logits: Tensor | None, own: Callable[[], Tensor]) -> Tensor:
            nonlocal live
            if running.noise is None:
                live = own()
            else:
                live = running.noise.choose(layer, tap, scores, logits)
            return _serve(running, layer, tap, live)

        noise = running.noise
        # The live choice comes first and apart where groups are limited: once the groups of the
        # served ids are opened, the scores of those that the router would have opened are masked
        # away. And where the noisy choice is not the K largest of the noisy logits.
        if (running.replay is not None and tap.num_groups is not None) or (
            noise is not None and not tap.follows_logits
        ):
            perturb = None if noise is None else partial(noise.perturb, layer, tap)
            with _apart():
                alone = RouterCall(tap, perturb=perturb)
                alone.run(forward, args, kwargs)
            live = alone.chosen
            assert live is not None
            call = RouterCall(tap, ids=_serve(running, layer, tap, live))
        elif running.replay is not None or running.noise is not None:
            call = RouterCall(tap, decide=decide)
        else:
            call = RouterCall(tap)
        output = call.run(forward, args, kwargs)
        self._note(running, layer, call, live)
        return output

    def _note(self, running: Pass, layer: int, call: RouterCall, live: Tensor | None) -> None:
        tap = self.taps[layer]
        assert call.chosen is not None
        _require_every_token(running, tap, call.chosen)
        for recorder, _ in running.recorders:
            recorder.buffer.keep(layer, call.chosen, call.logits, tap)
        if running.replay is not None and live is not None:
            running.replay[0].live.keep(layer, live, call.logits, tap)


class _Tapped:
    """A router's `forward` while the taps are on.

    A copy of the model, or a saved one, has its router's own: it is not on this switchboard.
    """

    def __init__(self, board: Switchboard, layer: int, forward: Forward) -> None:
        self.board, self._layer, self._forward = board, layer, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.board.call_router(self._layer, self._forward, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Forward:
        module = self.board.taps[self._layer].module
        if id(module) not in memo:
            return self
        if self._forward != types.MethodType(type(module).forward, module):
            own: Forward = copy.deepcopy(self._forward, memo)
            return own
        return types.MethodType(type(module).forward, memo[id(module)])

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.board.taps[self._layer].module, "forward")


class _Watch:
    """A hook of the switchboard; in a copy of the model it does nothing."""

    def __init__(self, hook: Callable[..., None]) -> None:
        self._hook = hook

    def __call__(self, *args: Any) -> None:
        self._hook(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Watch":
        return _Watch(_nothing)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Watch, (_nothing,)


def _nothing(*_: Any) -> None:
    pass


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


def _require_no_other(tap: RouterTap, backbone: nn.Module) -> None:
    """Two switchboards on one router would each take the other for the router itself."""
    forward = tap.module.__dict__.get("forward")
    if isinstance(forward, _Tapped) and forward.board.open:
        raise ValueError(
            f"model: router {tap.name!r} is watched already by a context on "
            f"{type(forward.board.backbone).__name__}, and this one is opened on "
            f"{type(backbone).__name__}. Open contexts that hold at the same time on one and the "
            "same module."
        )


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


def _serve(running: Pass, layer: int, tap: RouterTap, live: Tensor) -> Tensor:
    _require_every_token(running, tap, live)
    ids = live
    if running.replay is not None:
        replay, span = running.replay
        ids = replay.ids(layer, span, live)
    running.used.keep(layer, ids)
    return ids


def _require_every_token(running: Pass, tap: RouterTap, ids: Tensor) -> None:
    tokens = ids.numel() // tap.top_k
    if tokens != running.tokens:
        raise ValueError(
            f"model: router {tap.name!r} routed {tokens} tokens of a forward of {running.tokens}. "
            "Routing can be recorded only where every router sees every token; switch off padding "
            "removal and sequence parallelism."
        )


def _batch_and_length(named: dict[str, Any]) -> tuple[int, int]:
    for name in ("input_ids", "inputs_embeds"):
        tokens = named.get(name)
        if isinstance(tokens, Tensor):
            return tokens.shape[0], tokens.shape[1]
    raise ValueError(
        "input_ids: the forward got neither input_ids nor inputs_embeds, so its tokens have no "
        "place in a record. Pass one of them, [B, S] or [B, S, H]."
    )
