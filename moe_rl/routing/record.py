"""Record which experts a model chooses, and collect the logits of its routers."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from .gate_weights import check_has_gate_weights
from .routed_experts import Cursor, RecordedRouting
from .switchboard import tapped


@contextmanager
def record_routing(
    model: nn.Module,
    *,
    router_logits: bool = False,
    gate_weights: bool = False,
    router_margins: bool = False,
) -> Iterator[RecordedRouting]:
    """Record the experts that every token of every forward in the block is sent to.

        with record_routing(model) as recorded:
            model(input_ids)
        recorded.routed_experts  # int16 [B, S, L, K]

    Forwards that continue a KV cache (generation, chunked prefill) are joined along S; forwards
    that start over are joined along B, the shorter ones padded with -1. Generation by `generate`
    records every token that was fed to the model, that is all but the last. Beam search reorders
    the rows of the cache unseen and must not be recorded. Under `replay_routing` or
    `router_noise` the ids that were used are recorded. Changes nothing about the forward.

    Args:
        router_logits: keep the raw router logits `[B, S, L, E]` too.
        gate_weights: keep the weights `[B, S, L, K]` too that the chosen experts counted with.
        router_margins: keep how far each router was from another set `[B, S, L]` too.

    Raises:
        ValueError: the model has no router that can be recorded, see `find_routers`; or one whose
            gate weights cannot be told (Inkling, or a router of your own that does not return
            them beside its ids).
    """
    with tapped(model) as board:
        if gate_weights:
            check_has_gate_weights(board.taps)
        recorded = RecordedRouting(
            len(board.taps),
            router_logits=router_logits,
            gate_weights=gate_weights,
            router_margins=router_margins,
            cursor=Cursor(),
        )
        board.recorders.append(recorded)
        try:
            yield recorded
        finally:
            board.recorders.remove(recorded)


@contextmanager
def collect_router_logits(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the raw logits `[..., E]` of each router of each forward in the block, in order.

    They keep their graph, for load-balancing losses. What a router chooses and returns stays as it
    is. Families whose forward does not return its router logits (DeepSeek-V3) are served like those
    that do.

    Raises:
        ValueError: the model has no router (see `find_routers`), or one that computes no product
            of width E.
    """
    found: list[Tensor] = []
    with tapped(model) as board:
        board.collectors.append(found)
        try:
            yield found
        finally:
            board.collectors = [other for other in board.collectors if other is not found]
