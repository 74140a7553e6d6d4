"""Routing room: the record itself, `routed_experts [B, S, L, K]`, and where a forward lies in it.

B sequences, S positions, L MoE layers, K experts per token. int16 expert ids; a negative id means
"no record: use the live choice" for its token at its layer.
"""

import contextlib
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .taps import RouterTap

NO_RECORD = -1


def check_routed_experts(
    routed_experts: Tensor, *, num_layers: int, num_experts: int, top_k: int
) -> None:
    """Raise ValueError unless `routed_experts` can be replayed on a model of that shape.

    Checked: an integer tensor `[B, S, L, K]`, L and K those of the model, ids in [-1, E), the K
    ids of a token different from each other, and not a record of nothing but zeros.
    """
    check_shape(routed_experts, num_layers=num_layers, top_k=top_k)
    if routed_experts.numel() == 0:
        return
    low, high = (int(value) for value in routed_experts.aminmax())
    if low < NO_RECORD or high >= num_experts:
        raise ValueError(
            f"routed_experts: ids range from {low} to {high}, but the model has {num_experts} "
            f"experts. Ids must lie in [0, {num_experts}); use -1 where there is no record."
        )
    if high == 0 and num_experts > 1:
        raise ValueError(
            "routed_experts: every recorded id is 0: the engine that made this record recorded "
            "nothing. Turn its routing record on; to replay it as it is, pass validate=False."
        )
    # Comparing with every rotation by up to K // 2 places compares every pair, without a sort.
    for shift in range(1, top_k // 2 + 1):
        same = routed_experts == routed_experts.roll(shift, dims=-1)
        if low < 0:
            same &= (routed_experts >= 0).all(dim=-1, keepdim=True)
        if bool(same.any()):
            b, s, layer, _ = (int(value) for value in same.nonzero()[0])
            raise ValueError(
                f"routed_experts: [{b}, {s}, {layer}] holds {routed_experts[b, s, layer].tolist()}"
                ", which names an expert twice. The K ids of a token must differ; use -1 where "
                "there is no record."
            )


def check_shape(routed_experts: Tensor, *, num_layers: int, top_k: int) -> None:
    """Raise ValueError unless `routed_experts` is an integer tensor `[B, S, L, K]`."""
    if routed_experts.dtype not in (torch.int16, torch.int32, torch.int64):
        raise ValueError(
            f"routed_experts: dtype is {routed_experts.dtype}; pass int16, int32 or int64 ids."
        )
    shape = tuple(routed_experts.shape)
    if len(shape) != 4 or shape[2:] != (num_layers, top_k):
        raise ValueError(
            f"routed_experts: shape is {list(shape)}, but the model has {num_layers} routers that "
            f"choose {top_k} experts each. Pass [B, S, {num_layers}, {top_k}], one layer for each "
            "MoE layer (leave dense layers out)."
        )


@dataclass(frozen=True, kw_only=True)
class Span:
    """Where one forward lies in a record: rows `row : row + batch`, positions from `start`."""

    row: int
    batch: int
    start: int
    length: int

    @property
    def tokens(self) -> int:
        """Tokens of the forward, N = batch * length."""
        return self.batch * self.length


class Cursor:
    """Maps successive forwards to spans of a record.

    The cache length of the first forward is `base` (0 unless the cache was filled before). A later
    forward with a longer cache continues the same rows along S; one whose cache length is `base`
    again starts the next block of rows, and after the last row the first.

    Args:
        num_rows: B of the record, None while recording, when rows have no end.
        length: S of the record.
    """

    def __init__(self, num_rows: int | None = None, length: int | None = None) -> None:
        self.num_rows, self.length = num_rows, length
        self.base: int | None = None
        self.block: Span | None = None
        self._before: tuple[int | None, Span | None] = (None, None)
        self._rows_of: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def undo(self) -> None:
        """Forget the last forward: it failed."""
        self.base, self.block = self._before

    def own(self, cache: Any, span: Span) -> None:
        """Note which rows a KV cache holds, if it is an object that can be told from others."""
        with contextlib.suppress(TypeError):
            self._rows_of[cache] = span.row

    def place(self, *, batch: int, length: int, cached: int, cache: Any = None) -> Span:
        """Return the span of a forward of `[batch, length]` tokens on a `cache` of `cached`."""
        base = cached if self.base is None else self.base
        start = cached - base
        if start < 0:
            raise ValueError(
                f"past_key_values: the cache holds {cached} positions, fewer than the {base} it "
                "held when this context began. Open one context for each cache."
            )
        if start > 0 and self.block is not None:
            self._check_cache(cache, start, self.block)
        span = Span(row=self._row(batch, start), batch=batch, start=start, length=length)
        self._before = (self.base, self.block)
        self.base, self.block = base, span
        return span

    def _check_cache(self, cache: Any, start: int, block: Span) -> None:
        """Refuse a cache that is another than the last forward's, as far as that can be told."""
        try:
            row = self._rows_of.get(cache)
        except TypeError:  # no object that can be told from others
            return
        behind = row is None and start < block.start + block.length
        if behind or row not in (None, block.row):
            held = f"row {row}" if row is not None else f"position {start}"
            raise ValueError(
                f"past_key_values: this cache goes on from {held}, and another one from row "
                f"{block.row}, position {block.start + block.length} has come since. A context "
                "follows one cache at a time: finish a batch before the next, or open a context "
                "for each."
            )

    def check_packed(self, span: Span, position_ids: Any) -> None:
        """Refuse sequences that are packed into rows of another length than the record's."""
        if self.length is None or span.start > 0 or span.length == self.length:
            return
        if isinstance(position_ids, Tensor) and bool((position_ids.diff(dim=-1) < 0).any()):
            raise ValueError(
                f"routed_experts: position_ids start over within a forward of [{span.batch}, "
                f"{span.length}] tokens, on a record of [{self.num_rows}, {self.length}]. Of "
                "packed sequences pass a packed record, [1, sum of lengths, L, K]."
            )

    def _row(self, batch: int, start: int) -> int:
        if start > 0:
            return self._same_row(batch, start)
        row = 0 if self.block is None else self.block.row + self.block.batch
        if self.num_rows is None:
            return row
        row = 0 if row == self.num_rows else row
        if row + batch > self.num_rows:
            raise ValueError(
                f"routed_experts: a forward of {batch} sequences starts at row {row} of a record "
                f"of {self.num_rows}. Pass the rows of exactly the sequences of the batch, in "
                "their order, and let the sizes of the forwards add up to them."
            )
        return row

    def _same_row(self, batch: int, start: int) -> int:
        assert self.block is not None
        if batch != self.block.batch:
            raise ValueError(
                f"input_ids: {batch} sequences continue a cache of {self.block.batch}. Open one "
                "context for each batch."
            )
        if start > self.block.start + self.block.length:
            raise ValueError(
                f"past_key_values: the cache is {start - self.block.start - self.block.length} "
                "positions longer than what passed through the model in this context. Open the "
                "context before the cache is filled, or after."
            )
        return self.block.row


class RoutingBuffer:
    """Collects what routers did, forward by forward, and stacks it when it is read.

    Args:
        num_layers: L, routers of the model.
        scores: keep the raw router logits too.
    """

    def __init__(self, num_layers: int, *, scores: bool) -> None:
        self.num_layers = num_layers
        self.scores = scores
        self._ids: list[tuple[Span, Tensor]] = []
        self._logits: list[tuple[Span, Tensor]] = []
        self._open_ids: list[Tensor | None] = []
        self._open_logits: list[Tensor | None] = []

    def open(self, span: Span) -> None:
        """Begin a forward. A second pass over the first rows replaces the first pass."""
        self._open_ids = [None] * self.num_layers
        self._open_logits = [None] * self.num_layers
        if span.row == 0 and span.start == 0:
            self._ids.clear()
            self._logits.clear()

    def keep(self, layer: int, ids: Tensor, logits: Tensor | None, tap: RouterTap) -> None:
        """Note the ids `[..., K]` and logits `[..., E]` of one router."""
        if self._open_ids[layer] is not None:
            raise ValueError(
                f"model: router {tap.name!r} was called twice in one forward. A record holds one "
                "choice for each token and layer; record modules that share a router one by one."
            )
        self._open_ids[layer] = ids.detach().flatten(0, -2).to(torch.int16)
        if not self.scores:
            return
        if logits is None:
            raise ValueError(
                f"scores: router {tap.name!r} computes no product of {tap.num_experts} columns, so "
                "it has no raw logits to keep. Open the context with scores=False."
            )
        self._open_logits[layer] = logits.detach().flatten(0, -2).float()

    def missing(self) -> list[int]:
        """Layers that the forward has not passed."""
        return [layer for layer, ids in enumerate(self._open_ids) if ids is None]

    def close(self, span: Span) -> None:
        """End a forward that passed every layer."""
        ids = [ids for ids in self._open_ids if ids is not None]
        self._ids.append((span, torch.stack([i.to(ids[0].device) for i in ids])))
        logits = [logits for logits in self._open_logits if logits is not None]
        if logits:
            self._logits.append((span, torch.stack([x.to(logits[0].device) for x in logits])))

    def routed_experts(self) -> Tensor:
        """Return int16 ids `[B, S, L, K]`, -1 where nothing ran."""
        return _assemble(self._ids, fill=NO_RECORD)

    def router_logits(self) -> Tensor:
        """Return raw logits `[B, S, L, E]` float32, NaN where nothing ran."""
        if not self.scores:
            raise ValueError("router_logits: not kept. Open the context with scores=True.")
        return _assemble(self._logits, fill=float("nan"))


def _assemble(pieces: list[tuple[Span, Tensor]], *, fill: float) -> Tensor:
    """Put pieces `[L, N, X]` to their places in one `[B, S, L, X]`; later pieces win."""
    if not pieces:
        raise ValueError(
            "nothing is recorded: no forward of the model has completed in this context. Run the "
            "model inside the `with` block before reading."
        )
    # The last piece of a block says how long it is: a cache may have been cut back before it.
    ends = {span.row: span.start + span.length for span, _ in pieces}
    rows = max(span.row + span.batch for span, _ in pieces)
    first = pieces[0][1]
    layers, _, width = first.shape
    span = pieces[0][0]
    if len(pieces) == 1 and span.row == span.start == 0:
        return first.view(layers, span.batch, span.length, width).permute(1, 2, 0, 3).contiguous()
    out = first.new_full((rows, max(ends.values()), layers, width), fill)
    for span, piece in pieces:
        length = min(span.length, ends[span.row] - span.start)
        if length > 0:
            block = piece.view(layers, span.batch, span.length, width).permute(1, 2, 0, 3)
            rows_here = slice(span.row, span.row + span.batch)
            out[rows_here, span.start : span.start + length] = block[:, :length]
    return out
