"""Replay recorded experts instead of choosing them anew (routing replay).

R2 replays the choice of the old policy, R3 (arXiv 2510.11370) that of the rollout engine; both are
`replay_routing` with another record. The replayed experts are weighted by the CURRENT router's
scores, so the router still learns; TRR (PrimeIntellect's prime-rl, #3509) replays the engine's gate
weights as well, and the router learns nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from .gate_weights import check_gate_weights, check_has_gate_weights
from .routed_experts import ReplayedRouting, check_routed_experts, check_shape
from .switchboard import tapped


@contextmanager
def replay_routing(
    model: nn.Module,
    routed_experts: Tensor,
    *,
    gate_weights: Tensor | None = None,
    router_logits: bool = False,
    validate: bool = True,
) -> Iterator[ReplayedRouting]:
    """Send every token of every forward in the block to the recorded experts.

        with replay_routing(model, routed_experts) as replayed:
            loss = ...model(input_ids)...
            loss.backward()

    A router's gate weights become f(scores gathered at the recorded ids), f being its own
    normalisation and scaling and the scores those of all E experts under the current weights;
    with `gate_weights` they are the recorded ones.
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
        routed_experts: int16, int32 or int64 ids `[B, S, L, K]`; negative: no record.
        gate_weights: float weights `[B, S, L, K]` that the recorded experts count with, as
            `record_routing(model, gate_weights=True)` has them, instead of the current router's.
            The routers' parameters then get a gradient of exactly 0 from recorded tokens.
        router_logits: keep the raw router logits `[B, S, L, E]` too.
        validate: check ids for range, uniqueness and emptiness, weights for NaN and inf; False in
            hot loops over a record that has been checked, where a bad id would then fail inside a
            kernel.

    Raises:
        ValueError: the record does not fit the model, or a forward does not fit the record; the
            model has no router that can be replayed, or none whose gate weights can (see
            `record_routing`); or it is replaying already.
    """
    with tapped(model) as board:
        tap = board.taps[0]
        shape = {"num_layers": len(board.taps), "top_k": tap.top_k}
        if validate:
            check_routed_experts(routed_experts, num_experts=tap.num_experts, **shape)
        else:
            check_shape(routed_experts, **shape)
        if gate_weights is not None:
            check_has_gate_weights(board.taps)
            check_gate_weights(gate_weights, routed_experts, finite=validate)
        device = next(iter(tap.module.parameters()), routed_experts).device
        replayed = ReplayedRouting(
            routed_experts, gate_weights, device=device, router_logits=router_logits
        )
        with board.hold("replay", replayed):
            yield replayed
