"""Routing statistics in one pass over the router logits: live choice, churn, margin, entropy, and
the gate weights of a recorded choice.

The same quantities one by one are in `moe_rl/routing/statistics.py`, and tests hold the two
together. Each of those reads the logits again; on a GPU, where reading them is the cost, the Triton
kernel of `triton_routing.py` reads them once. Shapes: `...` any axes (tokens, layers), E experts, K
experts per token.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moe_rl.kernels.arguments import can_look
from moe_rl.kernels.choose import named_backend, triton_obstacle
from moe_rl.runtime.choice import Choice

_BACKENDS = ("auto", "reference", "triton")
_ID_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class RoutingStatistics(NamedTuple):
    """What `routing_statistics` returns; float32 unless said otherwise, without gradients."""

    live_experts: Tensor
    """int16 `[..., K]`: the K largest logits, descending."""
    churn: Tensor
    """`[...]` in [0, 1]: share of the live experts that the record lacks; NaN without a record."""
    margin: Tensor
    """`[...]` logit of the K-th choice minus that of the (K+1)-th; +inf where E == K."""
    entropy: Tensor
    """`[...]` of the softmax over E experts, nats in [0, log E]."""
    replay_weights: Tensor
    """`[..., K]` softmax over E experts at the recorded ids; at the live ones without a record."""


def routing_statistics(
    router_logits: Tensor, routed_experts: Tensor, *, backend: str = "auto"
) -> RoutingStatistics:
    """Statistics of a router's live choice against a recorded one.

        live   = topk(logits, K)
        churn  = |live \\ record| / K
        margin = logits_(K) - logits_(K+1), sorted descending
        entropy = -sum_e r_e log r_e,  r = softmax(logits)
        replay_weights = r[record]

    Equal logits at the boundary are chosen in an order that differs between backends; a row with a
    NaN has a NaN margin and an arbitrary choice.

    Args:
        router_logits: `[..., E]`, floating point, read as float32.
        routed_experts: recorded ids `[..., K]`, any integer dtype, below E; one negative id: no
            record. Larger ones are an error on a CPU; a GPU's queue is not drained to look.
        backend: `auto`, `reference` (PyTorch) or `triton`.

    Raises:
        ValueError: shapes, dtypes or ids that do not fit, or a backend that cannot run here.
    """
    num_experts, top_k = router_logits.shape[-1], routed_experts.shape[-1]
    if (
        not router_logits.is_floating_point()
        or routed_experts.dtype not in _ID_DTYPES
        or router_logits.shape[:-1] != routed_experts.shape[:-1]
        or not 1 <= top_k <= num_experts
    ):
        raise ValueError(
            f"router_logits={router_logits.dtype} {list(router_logits.shape)}, "
            f"routed_experts={routed_experts.dtype} {list(routed_experts.shape)}: must be floating "
            "point [..., E] and integer [..., K] that agree in all axes but the last, 1 <= K <= E"
        )
    look = can_look(routed_experts) and routed_experts.numel() > 0
    if look and int(routed_experts.max()) >= num_experts:
        raise ValueError(
            f"routed_experts={int(routed_experts.max())}: ids must lie below {num_experts}; pass "
            "-1 where there is no record"
        )
    lead = router_logits.shape[:-1]
    logits = router_logits.detach().reshape(-1, num_experts)
    ids = routed_experts.detach().reshape(-1, top_k)
    if choose_routing_backend(backend, router_logits.device).name == "triton":
        from moe_rl.kernels.triton_routing import triton_routing

        found = triton_routing(logits, ids)
    else:
        found = reference_routing(logits, ids)
    return RoutingStatistics(*(value.reshape(*lead, *value.shape[1:]) for value in found))


def choose_routing_backend(requested: str, device: torch.device | str) -> Choice:
    """The backend of `routing_statistics`, with its reason.

    Raises:
        ValueError: an unknown name, or a backend that cannot run on this device.
    """
    kind = torch.device(device).type
    if requested != "auto":
        return named_backend(requested, _BACKENDS, kind, torch.float32)
    obstacle = triton_obstacle(kind, torch.float32)
    if kind == "cuda" and obstacle is None:
        return Choice("triton", "CUDA device and Triton: one pass over the logits")
    if kind != "cuda":
        return Choice("reference", f"on {kind} there is no kernel launch to save")
    return Choice("reference", f"the Triton kernel cannot run: {obstacle}")


def reference_routing(logits: Tensor, ids: Tensor) -> RoutingStatistics:
    """The definition, for `[T, E]` logits and `[T, K]` ids."""
    logits, ids = logits.float(), ids.long()
    top_k, num_experts = ids.shape[1], logits.shape[1]
    best = logits.topk(min(top_k + 1, num_experts), dim=-1)
    live = best.indices[:, :top_k]
    if top_k == num_experts:
        margin = torch.full_like(logits[:, 0], float("inf"))
    else:
        margin = best.values[:, -2] - best.values[:, -1]
    recorded = (ids >= 0).all(dim=-1)
    missing = (live.unsqueeze(2) != ids.unsqueeze(1)).all(dim=2)
    log_r = logits.log_softmax(dim=-1)
    spread = -(log_r.exp() * log_r.clamp_min(torch.finfo(log_r.dtype).min)).sum(dim=-1)
    used = ids.where(recorded.unsqueeze(1), live)
    return RoutingStatistics(
        live_experts=live.to(torch.int16),
        churn=missing.float().mean(dim=-1).masked_fill(~recorded, torch.nan),
        margin=margin.masked_fill(logits.isnan().any(dim=-1), torch.nan),
        entropy=spread,
        replay_weights=log_r.gather(-1, used).exp(),
    )
