"""What the tests of routing share: a model's own routes, foreign ones, and what is left of taps."""

import torch
from torch import Tensor

from moe_rl.routing import find_routers, record_routing


def record(model, tokens, **kwargs) -> Tensor:
    """The model's own routes of one forward without gradients."""
    with torch.no_grad(), record_routing(model) as recorded:
        model(tokens, **kwargs)
    return recorded.routed_experts


def foreign(model, shape, seed: int = 3) -> Tensor:
    """Random ids `[B, S, L, K]`, unique within a token."""
    taps = find_routers(model)
    draws = torch.rand(
        *shape, len(taps), taps[0].num_experts, generator=torch.Generator().manual_seed(seed)
    )
    return draws.topk(taps[0].top_k, dim=-1).indices.to(torch.int16)


def clean(model) -> bool:
    """Whether no tap and no hook is left on a model."""
    inside = model.model
    hooks = (*inside._forward_hooks, *inside._forward_pre_hooks)
    return not hooks and all("forward" not in tap.module.__dict__ for tap in find_routers(model))
