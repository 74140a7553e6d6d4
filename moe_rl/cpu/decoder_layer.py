"""Stands in for a Qwen3-MoE decoder layer's `forward`: two autograd nodes before the MLP.

    h = x + attention(rms_norm(x))      one node, see `attention_block`
    y = h + mlp(rms_norm(h))            the norm is one node

The MLP, router and experts, is called as the module it is. The norms and the attention are inlined
here and not called as modules, so a layer with hooks on one of them, a layer under gradient
checkpointing, and any call that the fused attention does not serve run the class's own `forward`
over the swapped submodules.
"""

from typing import Any

from torch import Tensor

from moe_rl.cpu.attention import (
    Call,
    attention_forward,
    hooked,
    plain_weights,
    run_block,
    runs,
    serves,
)
from moe_rl.cpu.attention_block import BlockWeights
from moe_rl.cpu.one_pass import OnePass
from moe_rl.cpu.parts import PositionEmbeddings
from moe_rl.cpu.rms_norm import rms_norm, rms_norm_forward


def decoder_layer_forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = False,
    position_embeddings: PositionEmbeddings | None = None,
    one_pass: OnePass | None = None,
    **kwargs: Any,
) -> Tensor:
    """A decoder layer on `[B, T, H]`."""
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
    return hidden + self.mlp(normed)


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
