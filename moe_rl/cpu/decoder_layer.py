"""Stands in for a Qwen3-MoE decoder layer's `forward`: two autograd nodes around norm and router.

    h = x + attention(rms_norm(x))             one node, see `attention_block`
    y = h + experts(n, router(n)),  n = rms_norm(h)

The router is called as the module it is. Submodules whose work is inlined here are not called, so
a layer with hooks on one of them, a layer under gradient checkpointing, and any call that the
fused attention does not serve run the class's own `forward` over the swapped submodules.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from moe_rl.cpu.attention import (
    Call,
    Positions,
    attention_forward,
    hooked,
    plain_weights,
    run_block,
    runs,
    serves,
)
from moe_rl.cpu.attention_block import BlockWeights
from moe_rl.cpu.group_cache import GroupCache
from moe_rl.cpu.one_pass import OnePass
from moe_rl.cpu.rms_norm import rms_norm, rms_norm_forward
from moe_rl.experts.cpu_sorted import NAME as CPU_SORTED
from moe_rl.experts.cpu_sorted import run_experts, supports, turn_weights


def decoder_layer_forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = False,
    position_embeddings: Positions | None = None,
    one_pass: OnePass | None = None,
    **kwargs: Any,
) -> Tensor:
    """A decoder layer on `[B, T, H]`.

    Raises:
        ValueError: see `run_block`.
    """
    assert position_embeddings is not None
    call = Call(hidden_states, position_embeddings, attention_mask, past_key_values, one_pass)
    weights = _inlined_weights(self)
    if weights is None or not serves(self.self_attn, weights, call):
        if one_pass is not None:
            kwargs["one_pass"] = one_pass
        return type(self).forward(
            self,
            hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
    eps = self.input_layernorm.variance_epsilon
    hidden = run_block(self.self_attn, weights, call, eps)
    norm = self.post_attention_layernorm
    normed = rms_norm(hidden, norm.weight, norm.variance_epsilon)
    mlp = self.mlp
    if not _runs_experts(mlp, normed):
        return hidden + mlp(normed)
    rows, residual = normed.view(-1, normed.shape[-1]), hidden.view(-1, hidden.shape[-1])
    _, top_k_weights, top_k_index = mlp.gate(rows)
    weights_of_experts = (mlp.experts.gate_up_proj, mlp.experts.down_proj)
    turned = None
    if isinstance(past_key_values, GroupCache) and not torch.is_grad_enabled():
        layer = past_key_values.layers[self.self_attn.layer_idx]
        turned = layer.prepared(
            "experts", weights_of_experts, lambda: turn_weights(*weights_of_experts)
        )
    out = run_experts(
        rows, top_k_index, top_k_weights, *weights_of_experts, residual=residual, turned=turned
    )
    return out.view(hidden.shape)


def _inlined_weights(layer: Any) -> BlockWeights | None:
    """Weights of norm and attention, if skipping these modules' `__call__` goes unnoticed."""
    if layer.gradient_checkpointing and layer.training:
        return None
    attention, first = layer.self_attn, layer.input_layernorm
    second = layer.post_attention_layernorm
    if not (
        runs(attention, attention_forward)
        and runs(first, rms_norm_forward)
        and runs(second, rms_norm_forward)
    ):
        return None
    if hooked(attention) or hooked(second):
        return None
    return plain_weights(attention, first)


def _runs_experts(mlp: Any, hidden: Tensor) -> bool:
    """Whether the MLP is a router and experts that `run_experts` stands in for, unnoticed."""
    if type(mlp) is not Qwen3MoeSparseMoeBlock or "forward" in vars(mlp):
        return False
    experts = mlp.experts
    return (
        experts.config._experts_implementation == CPU_SORTED
        and "forward" not in vars(experts)
        and supports(experts, hidden)
        and not hooked(mlp)
        and not hooked(experts)
    )
