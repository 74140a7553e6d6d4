"""Routing room: record, replay and perturb the expert choices of transformers MoE models.

This room depends on torch and transformers only, so it can be lifted into any trainer.

    routed_experts.py  the record `[B, S, L, K]`: its checks, and where a forward lies in it
    taps.py            find the routers of a model
    router_call.py     listen to, or answer, the topk of one router call
    switchboard.py     the taps on a model, shared by every context on it
    recomputation.py   gradient checkpointing: which forward's routes a recomputation gets
    record.py, replay.py, noise.py   the three contexts
    statistics.py      churn, disagreement, margin, load: pure functions of tensors
    top_k.py           topk for the few scores of a router, fast on a CPU
    families.py, gate_formula.py   every family of transformers as a small model, and its weights
    check.py, check_*.py, experts_watch.py   the independent checker, of models and of traces
    foreign.py, traces.py   routes of vLLM, SGLang and Megatron-LM, made into the record
"""

from .check import Finding, check_replay
from .check_trace import check_trace
from .foreign import fit_to_model
from .noise import router_noise
from .record import RecordedRouting, record_routing
from .replay import ReplayedRouting, replay_routing
from .routed_experts import check_routed_experts
from .taps import ChoosesExperts, RouterTap, find_routers
from .traces import Trace, read_trace, write_trace

__all__ = [
    "ChoosesExperts",
    "Finding",
    "RecordedRouting",
    "ReplayedRouting",
    "RouterTap",
    "Trace",
    "check_replay",
    "check_routed_experts",
    "check_trace",
    "find_routers",
    "fit_to_model",
    "read_trace",
    "record_routing",
    "replay_routing",
    "router_noise",
    "write_trace",
]
