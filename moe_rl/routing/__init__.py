"""Record, replay and perturb the expert choices of transformers MoE models.

This package depends on torch and transformers only, so it can be lifted into any trainer.

    routed_experts.py  the record `[B, S, L, K]`: its checks, and where a forward lies in it
    taps.py            find the routers of a model
    router_call.py     listen to, or answer, the topk of one router call
    gate_weights.py    find, and replace, the gate weights in what a router returns
    switchboard.py     the taps on a model, shared by every context on it
    recomputation.py   gradient checkpointing: which forward's routes a recomputation gets
    record.py, replay.py, noise.py   the contexts that a user opens
    statistics.py      churn, disagreement, margin, load: pure functions of tensors
    top_k.py           topk for the few scores of a router, fast on a CPU
"""

from .noise import router_noise
from .record import collect_router_logits, record_routing
from .replay import replay_routing
from .routed_experts import RecordedRouting, ReplayedRouting, check_routed_experts
from .taps import ChoosesExperts, RouterTap, find_routers

__all__ = [
    "ChoosesExperts",
    "RecordedRouting",
    "ReplayedRouting",
    "RouterTap",
    "check_routed_experts",
    "collect_router_logits",
    "find_routers",
    "record_routing",
    "replay_routing",
    "router_noise",
]
