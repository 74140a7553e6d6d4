"""Stands in for a Qwen3-MoE router's `forward`: the same scores, chosen among by `top_k`."""

from typing import Any

import torch
from torch import Tensor

from moe_rl.routing.top_k import top_k


def router_forward(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits `[N, E]`, gate weights and expert ids `[N, K]` of hidden states `[..., H]`."""
    hidden_states = hidden_states.reshape(-1, self.hidden_dim)
    logits = torch.nn.functional.linear(hidden_states, self.weight)
    weights, indices = top_k(logits.softmax(dim=-1, dtype=torch.float), self.top_k)
    if self.norm_topk_prob:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return logits, weights.to(logits.dtype), indices
