"""The record itself, `routed_experts [B, S, L, K]`, and where a forward lies in it.

B sequences, S positions, L MoE layers, K experts per token. int16 expert ids; a negative id means
"no record: use the live choice" for its token at its layer.
"""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .gate_weights import FixedWeights

NO_RECORD = -1


def check_routed_experts(
    routed_experts: Tensor, *, num_layers: int, num_experts: int, top_k: int
) -> None:
    """Raise ValueError unless `routed_experts` can be replayed on a model of that shape.

    Checked: an integer tensor `[B, S, L, K]`, L and K those of the model, ids in [-1, E), the K ids
    of a token different from each other, and not a record of nothing but zeros.
    """
    check_shape(routed_experts, num_layers=num_layers, top_k=top_k)
    if routed_experts.numel() == 0:
        return
    low, high = (int(value) for value in routed_experts.aminmax())
    if low < NO_RECORD or high >= num_experts:
        raise ValueError(
            f"routed_experts: ids range from {low} to {high}, but the model has {num_experts} "
            f"experts; pass ids in [0, {num_experts}), and -1 where there is no record"
        )
    if high == 0 and num_experts > 1:
        raise ValueError(
            "routed_experts: every recorded id is 0, so the engine recorded nothing; "
            "turn its routing record on, or pass validate=False to replay it as it is"
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
                ", which names an expert twice; pass K different ids, or -1 where there is no "
                "record"
            )


def check_shape(routed_experts: Tensor, *, num_layers: int, top_k: int) -> None:
    """Raise ValueError unless `routed_experts` is a signed integer tensor `[B, S, L, K]`."""
    shape, dtype = tuple(routed_experts.shape), routed_experts.dtype
    integers = dtype in (torch.int16, torch.int32, torch.int64)
    if not integers or len(shape) != 4 or shape[2:] != (num_layers, top_k):
        raise ValueError(
            f"routed_experts: shape is {list(shape)} of {dtype}, but the model has {num_layers} "
            f"routers that choose {top_k} experts each; pass int16, int32 or int64 ids "
            f"[B, S, {num_layers}, {top_k}], without dense layers"
        )


@dataclass(frozen=True, kw_only=True)
class Span:
    """Where one forward lies in a record: rows `row : row + batch`, positions from `start`."""

    row: int
    batch: int
    start: int
    length: int

    @property
    def end(self) -> int:  # behind the last position
        return self.start + self.length


class Cursor:
    """Maps successive forwards to spans of a record.

    The cache length of the first forward is `base` (0 unless the cache was filled before). A later
    forward with a longer cache continues the same rows along S; one whose cache length is `base`
    again starts the next block of rows, and after the last row the first.

    `num_rows` and `length` are B and S of the record, None while recording: rows have no end then.
    """

    def __init__(self, num_rows: int | None = None, length: int | None = None) -> None:
        self.num_rows, self.length = num_rows, length
        self._base: int | None = None
        self._last: Span | None = None
        self._before: tuple[int | None, Span | None] = (None, None)
        self.rows_of: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    @property
    def span(self) -> Span:
        """Where the last forward lies."""
        assert self._last is not None
        return self._last

    def place(self, batch: int, length: int, cached: int, cache: Any, position_ids: Any) -> None:
        """Take the span of a forward of `[batch, length]` tokens on a `cache` of `cached`.

        `position_ids` is None where padding may have put anything into them.
        """
        base = cached if self._base is None else self._base
        start = cached - base
        if start == 0:
            row = self._next_row(batch, length, position_ids)
        else:
            row = self._same_row(batch, start, cached, cache)
        self._before = (self._base, self._last)
        self._base = base
        self._last = Span(row=row, batch=batch, start=start, length=length)

    def undo(self) -> None:
        """Forget the last forward: it failed."""
        self._base, self._last = self._before

    def _next_row(self, batch: int, length: int, position_ids: Any) -> int:
        row = 0 if self._last is None else self._last.row + self._last.batch
        if self.num_rows is None:
            return row
        row = 0 if row == self.num_rows else row
        # Packed sequences would take the routes of other tokens wherever the record is not packed.
        packed = isinstance(position_ids, Tensor) and length != self.length
        packed = packed and bool((position_ids.diff(dim=-1) < 0).any())
        if row + batch > self.num_rows or packed:
            raise ValueError(
                f"routed_experts: a forward of {batch} sequences starts at row {row} of a record "
                f"of {self.num_rows}; pass the rows of exactly the sequences of the batch in their "
                "order, and of packed sequences a packed record, [1, sum of lengths, L, K]"
            )
        return row

    def _same_row(self, batch: int, start: int, cached: int, cache: Any) -> int:
        last = self.span
        row = None if cache is None else self.rows_of.get(cache)
        # A cache that no forward of this context has filled, as a copy of another one, may be of
        # any rows; known ones may have been cut back.
        fits = start == last.end if row is None else row == last.row and 0 < start <= last.end
        if not fits or batch != last.batch:
            raise ValueError(
                f"past_key_values: a cache of {cached} positions of {batch} sequences does not "
                f"continue the last forward of this context ({last.batch} sequences up to "
                f"position {cached - start + last.end}); finish a batch before the next, or "
                "open a context for each cache"
            )
        return last.row


class RecordedRouting:
    """What L routers did, forward by forward; can be read inside the block and after it."""

    def __init__(
        self,
        num_layers: int,
        *,
        router_logits: bool,
        gate_weights: bool = False,
        router_margins: bool = False,
        cursor: Cursor,
    ) -> None:
        self.keeps_logits, self.keeps_weights = router_logits, gate_weights
        self.keeps_margins = router_margins
        self.cursor = cursor
        self._ids: list[tuple[Span, Tensor]] = []
        self._logits: list[tuple[Span, Tensor]] = []
        self._weights: list[tuple[Span, Tensor]] = []
        self._margins: list[tuple[Span, Tensor]] = []
        # Of the forward under way, by layer; a later forward overwrites what a failed one left.
        self._layer_ids: list[Tensor] = [torch.empty(0)] * num_layers
        self._layer_logits = list(self._layer_ids)
        self._layer_weights = list(self._layer_ids)
        self._layer_margins = list(self._layer_ids)

    def keep(
        self,
        layer: int,
        ids: Tensor,
        logits: Tensor | None,
        weights: Tensor | None,
        margins: Tensor | None,
    ) -> None:
        """Note what one router did.

        Args:
            ids: `[..., K]`.
            logits: raw, `[..., E]`; None unless they are kept.
            weights: gate weights `[N, K]`; None unless they are kept.
            margins: `[..., 1]`; None unless they are kept.
        """
        self._layer_ids[layer] = ids.detach().flatten(0, -2).to(torch.int16)
        if logits is not None:
            self._layer_logits[layer] = logits.detach().flatten(0, -2).float()
        if weights is not None:
            self._layer_weights[layer] = weights.detach().float()
        if margins is not None:
            self._layer_margins[layer] = margins.flatten(0, -2)

    def close(self, cache: Any) -> None:
        """End a forward that passed every layer. A second pass over the first rows replaces all."""
        span = self.cursor.span
        if span.row == span.start == 0:
            self._ids.clear()
            self._logits.clear()
            self._weights.clear()
            self._margins.clear()
        self._ids.append((span, _stack(self._layer_ids)))
        if self.keeps_logits:
            self._logits.append((span, _stack(self._layer_logits)))
        if self.keeps_weights:
            self._weights.append((span, _stack(self._layer_weights)))
        if self.keeps_margins:
            self._margins.append((span, _stack(self._layer_margins)))
        if cache is not None:
            self.cursor.rows_of[cache] = span.row

    @property
    def routed_experts(self) -> Tensor:
        """int16 expert ids `[B, S, L, K]` in the router's order, -1 where nothing ran."""
        return _assemble(self._ids, fill=NO_RECORD)

    @property
    def router_logits(self) -> Tensor:
        """Raw router logits `[B, S, L, E]` float32, detached, NaN where nothing ran.

        Raises:
            ValueError: the context was opened without `router_logits=True`.
        """
        return _assemble(self._logits, fill=float("nan"))

    @property
    def gate_weights(self) -> Tensor:
        """Gate weights `[B, S, L, K]` float32 in the order of the ids, NaN where nothing ran.

        What each chosen expert counted with; float64 weights are rounded.

        Raises:
            ValueError: the context was opened without `gate_weights=True`.
        """
        return _assemble(self._weights, fill=float("nan"))

    @property
    def router_margins(self) -> Tensor:
        """How far each router was from another set of experts: float32 `[B, S, L]`.

        In logits where the largest logits are chosen, and else in the scores that are: with their
        bias, within the open groups. NaN where nothing ran, and for a router with a method of its
        own (`ChoosesExperts`), which may rank in any way.

        Raises:
            ValueError: the context was opened without `router_margins=True`.
        """
        return _assemble(self._margins, fill=float("nan")).squeeze(-1)


class ReplayedRouting:
    """A record to serve, and what the routers would have done. Readable inside and after."""

    def __init__(
        self,
        routed_experts: Tensor,
        gate_weights: Tensor | None = None,
        *,
        device: torch.device,
        router_logits: bool,
    ) -> None:
        self.routes = _by_layer(routed_experts, device)
        self.weights = None if gate_weights is None else _by_layer(gate_weights, device)
        num_layers, num_rows, length, _ = self.routes.shape
        self.has_gaps: list[bool] = (self.routes < 0).flatten(1).any(dim=1).tolist()
        cursor = Cursor(num_rows, length)
        self.live = RecordedRouting(num_layers, router_logits=router_logits, cursor=cursor)

    @property
    def live_routed_experts(self) -> Tensor:
        """int16 ids `[B, S, L, K]` the routers would have chosen in these forwards by themselves.

        A layer's live choice is made from the hidden states of the replayed layers below it.
        """
        return self.live.routed_experts

    @property
    def router_logits(self) -> Tensor:
        """As of `RecordedRouting`."""
        return self.live.router_logits

    @property
    def replayed(self) -> Tensor:
        """bool `[B, S, L]`: where the routers of these forwards were given their recorded ids."""
        ran = (self.live_routed_experts >= 0).all(dim=-1)
        rows, length, _ = ran.shape
        recorded = (self.routes[:, :rows, :length] >= 0).all(dim=-1).permute(1, 2, 0).to(ran.device)
        beyond = length - recorded.shape[1]
        return ran & torch.nn.functional.pad(recorded, (0, 0, 0, beyond), value=False)

    def ids(self, layer: int, live: Tensor) -> Tensor:
        """Ids of the shape of `live`: recorded, and live where there is no record."""
        ids = self._rows(self.routes[layer]).to(live.device, live.dtype).view(live.shape)
        if self.live.cursor.span.end > self.routes.shape[2] or self.has_gaps[layer]:
            ids = torch.where((ids < 0).any(dim=-1, keepdim=True), live, ids)
        return ids

    def fixed_weights(self, layer: int) -> FixedWeights | None:
        """The recorded gate weights of the forward under way; None if ids alone are replayed."""
        if self.weights is None:
            return None
        recorded = (self._rows(self.routes[layer]) >= 0).all(dim=-1, keepdim=True)
        return FixedWeights(weights=self._rows(self.weights[layer]), recorded=recorded)

    def _rows(self, record: Tensor) -> Tensor:
        """Of one layer's record `[B, S, K]` the tokens `[N, K]` of the forward under way."""
        span = self.live.cursor.span
        rows = record[span.row : span.row + span.batch, span.start : span.end]
        beyond = span.length - rows.shape[1]
        if beyond:
            rows = torch.nn.functional.pad(rows, (0, 0, 0, beyond), value=NO_RECORD)
        return rows.flatten(0, 1)


def _by_layer(record: Tensor, device: torch.device) -> Tensor:
    """`[B, S, L, K]` as `[L, B, S, K]`. A copy: whoever made the record may change it."""
    laid_out = record.detach().permute(2, 0, 1, 3)
    return laid_out.to(device).clone(memory_format=torch.contiguous_format)


def _stack(layers: list[Tensor]) -> Tensor:
    """Layers `[N, X]`, which may lie on several devices, as `[L, N, X]`."""
    return torch.stack([layer.to(layers[0].device) for layer in layers])


def _assemble(pieces: list[tuple[Span, Tensor]], *, fill: float) -> Tensor:
    """Put pieces `[L, N, X]` to their places in one `[B, S, L, X]`; later pieces win."""
    if not pieces:
        raise ValueError(
            "nothing is recorded: no forward of the model has completed in this context; run the "
            "model inside the `with` block before reading, and open it with router_logits=True to "
            "read logits, with gate_weights=True to read gate weights, with router_margins=True "
            "to read margins"
        )
    # The last piece of a block says how long it is: a cache may have been cut back before it.
    ends = {span.row: span.end for span, _ in pieces}
    rows = max(span.row + span.batch for span, _ in pieces)
    span, first = pieces[0]
    layers, _, width = first.shape
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
