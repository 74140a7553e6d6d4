"""Routing room: replay recorded experts instead of choosing them anew (routing replay).

R2 replays the choice of the old policy, R3 (arXiv 2510.11370) that of the rollout engine; both are
`replay_routing` with another record. The replayed experts are weighted by the CURRENT router's
scores, so the router still learns.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .routed_experts import Cursor, RoutingBuffer, Span, check_routed_experts, check_shape
from .switchboard import tapped


class Replay:
    """A record laid out for serving: `[L, B, S, K]` on the device of the routers."""

    def __init__(self, routed_experts: Tensor, *, device: torch.device, scores: bool) -> None:
        # A copy, even of a record that lies so already: whoever made it may change it.
        routes = routed_experts.detach().permute(2, 0, 1, 3)
        self.routes = routes.to(device).clone(memory_format=torch.contiguous_format)
        num_layers, num_rows, self.length, _ = self.routes.shape
        self.has_gaps: list[bool] = (self.routes < 0).flatten(1).any(dim=1).tolist()
        self.cursor = Cursor(num_rows, self.length)
        self.live = RoutingBuffer(num_layers, scores=scores)

    def ids(self, layer: int, span: Span, live: Tensor) -> Tensor:
        """Ids of the shape of `live`: recorded, and live where there is no record."""
        rows = slice(span.row, span.row + span.batch)
        routes = self.routes[layer, rows, span.start : span.start + span.length]
        beyond = span.length - routes.shape[1]
        if beyond:
            routes = torch.nn.functional.pad(routes, (0, 0, 0, beyond), value=-1)
        ids = routes.to(live.device, live.dtype).reshape(live.shape)
        if beyond or self.has_gaps[layer]:
            ids = torch.where((ids < 0).any(dim=-1, keepdim=True), live, ids)
        return ids


class ReplayedRouting:
    """What the routers would have done under `replay_routing`. Readable inside and after."""

    def __init__(self, live: RoutingBuffer) -> None:
        self._live = live

    @property
    def live_routed_experts(self) -> Tensor:
        """int16 ids `[B, S, L, K]` the routers would have chosen in these forwards by themselves.

        A layer's live choice is made from the hidden states of the replayed layers below it.
        """
        return self._live.routed_experts()

    @property
    def router_logits(self) -> Tensor:
        """Raw router logits `[B, S, L, E]` float32, detached.

        Raises:
            ValueError: the context was opened without `scores=True`.
        """
        return self._live.router_logits()


@contextmanager
def replay_routing(
    model: nn.Module, routed_experts: Tensor, *, scores: bool = False, validate: bool = True
) -> Iterator[ReplayedRouting]:
    """Send every token of every forward in the block to the recorded experts.

        with replay_routing(model, routed_experts) as replayed:
            loss = ...model(input_ids)...
            loss.backward()

    A router's gate weights become f(scores gathered at the recorded ids), f being its own
    normalisation and scaling and the scores those of all E experts under the current weights.
    A token with a negative id at a layer is routed live there, and so is every position past the
    end of the record: `generate` may run on beyond a recorded prompt.

    Forwards are matched to the record by position: a forward that continues a KV cache takes the
    following positions of the same rows, one that starts over takes the following rows, and
    after the last row the first. Sequences that are packed into one row need a record that is.
    Gradient checkpointing of layers recomputes with the same ids, of both kinds, and also when
    backward runs after the block; the loss must come from what the model returned. Checkpointing
    around the whole model is refused inside the block and goes unseen after it. One thread at a
    time may call a model with open contexts.

    Args:
        model: a transformers MoE model, or a wrapper that contains one.
        routed_experts: int16, int32 or int64 ids `[B, S, L, K]`; negative: no record.
        scores: keep the raw router logits `[B, S, L, E]` too.
        validate: check ids for range, uniqueness and emptiness; False in hot loops over a record
            that has been checked, where a bad id would then fail inside a kernel.

    Raises:
        ValueError: the record does not fit the model, or a forward does not fit the record; the
            model has no router that can be replayed; or it is replaying already.
    """
    with tapped(model) as board:
        tap = board.taps[0]
        if validate:
            check_routed_experts(
                routed_experts,
                num_layers=len(board.taps),
                num_experts=tap.num_experts,
                top_k=tap.top_k,
            )
        else:
            check_shape(routed_experts, num_layers=len(board.taps), top_k=tap.top_k)
        if board.replay is not None:
            raise ValueError(
                "routed_experts: this model is replaying another record. Close that context first."
            )
        device = next(iter(tap.module.parameters()), routed_experts).device
        replay = Replay(routed_experts, device=device, scores=scores)
        board.replay = replay
        try:
            yield ReplayedRouting(replay.live)
        finally:
            board.replay = None
