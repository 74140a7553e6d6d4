"""Swap the forwards of recognised modules on their instances, and swap them back.

An instance attribute `forward` shadows the class's: parameters, buffers, `state_dict`, hooks and
module names stay as they are, and deleting the attribute restores the stock layer.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeAttention,
    Qwen3MoeDecoderLayer,
    Qwen3MoeRMSNorm,
    Qwen3MoeRotaryEmbedding,
    Qwen3MoeTopKRouter,
)

from moe_rl.cpu.attention import attention_forward, plain_weights, runs
from moe_rl.cpu.decoder_layer import decoder_layer_forward
from moe_rl.cpu.rms_norm import EXACT_DTYPES, rms_norm_forward
from moe_rl.cpu.rotary import TABLE, rotary_forward
from moe_rl.cpu.router import router_forward
from moe_rl.runtime.choice import Choice

_FUSED: dict[type[Any], Callable[..., Any]] = {
    Qwen3MoeRMSNorm: rms_norm_forward,
    Qwen3MoeAttention: attention_forward,
    Qwen3MoeDecoderLayer: decoder_layer_forward,
    Qwen3MoeRotaryEmbedding: rotary_forward,
    Qwen3MoeTopKRouter: router_forward,
}


FUSED, STOCK = "fused", "stock"


def choose_layers(device: torch.device, dtype: torch.dtype) -> Choice:
    """Whether a model on `device` in `dtype` should run fused layers or transformers' own."""
    if device.type != "cpu":
        return Choice(STOCK, f"the fused layers are for CPUs, the model is on {device.type}")
    if dtype not in EXACT_DTYPES:
        return Choice(STOCK, f"the fused layers sum in the type of the input, which is {dtype}")
    return Choice(FUSED, "on a CPU in full precision fewer passes over the data take less time")


def use_fused_layers(model: nn.Module) -> list[str]:
    """Run norms, attention, routers and decoder layers of a Qwen3-MoE through our own code.

    Modules of other classes, not on a CPU, or whose `forward` somebody else has replaced, are left
    alone. Experts are not touched here: see `moe_rl.experts`.

    A swapped module checks every call, and hands what it does not serve (16-bit floats, a foreign
    cache, hooks or adapters on what it would skip, gradient checkpointing of a layer) to its class.

    Returns:
        Names of the modules that were swapped, in module order; empty when nothing was recognised.
    """
    swapped = []
    for name, module in model.named_modules():
        forward = _fused_forward(module)
        if forward is not None and "forward" not in vars(module):
            module.forward = MethodType(forward, module)
            swapped.append(name)
    return swapped


def restore_layers(model: nn.Module) -> list[str]:
    """Undo `use_fused_layers`; returns the names of the modules that were restored."""
    restored = []
    for name, module in model.named_modules():
        if _is_ours(module):
            del module.forward
            vars(module).pop(TABLE, None)
            restored.append(name)
    return restored


def _fused_forward(module: nn.Module) -> Callable[..., Any] | None:
    if any(tensor.device.type != "cpu" for tensor in (*module.parameters(), *module.buffers())):
        return None
    for stock, fused in _FUSED.items():
        # A subclass with a forward of its own is another layer.
        if isinstance(module, stock) and type(module).forward is stock.forward:
            known = _KNOWN.get(stock)
            return fused if known is None or known(module) else None
    return None


def _plain_attention(attention: Any) -> bool:
    """Whether the attention has no bias, no sliding window, and heads of an even size."""
    return (
        plain_weights(attention, None) is not None
        and attention.sliding_window is None
        and attention.head_dim % 2 == 0
    )


def _fixed_angles(rotary: Any) -> bool:
    """Whether the angles of a position are always the same: other types change with the length."""
    return rotary.rope_type == "default"


_KNOWN: dict[type[Any], Callable[[Any], bool]] = {
    Qwen3MoeAttention: _plain_attention,
    Qwen3MoeRotaryEmbedding: _fixed_angles,
}


def _is_ours(module: nn.Module) -> bool:
    return any(runs(module, fused) for fused in _FUSED.values())
