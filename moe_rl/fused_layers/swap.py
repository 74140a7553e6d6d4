"""Swap the forwards of recognised modules on their instances, and swap them back.

An instance attribute `forward` shadows the class's: parameters, buffers, `state_dict`, hooks and
module names stay as they are, and deleting the attribute restores the stock layer.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn
from transformers.cache_utils import DynamicCache
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeAttention, Qwen3MoeRMSNorm

from moe_rl.fused_layers.attention import attention_forward
from moe_rl.fused_layers.group_cache import GroupCache
from moe_rl.fused_layers.rms_norm import rms_norm_forward


def use_fused_layers(model: nn.Module) -> list[str]:
    """Run the norms (and attention) of a Qwen3-MoE through hand-written autograd nodes.

    Modules of other classes, and modules whose `forward` somebody else has already replaced, are
    left alone. Experts are not touched here: see `moe_rl.experts`.

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
        if _is_ours(vars(module).get("forward")):
            del module.forward
            restored.append(name)
    return restored


def new_cache(model: Any) -> GroupCache | DynamicCache:
    """An empty key-value cache: `GroupCache` where every attention is fused, else `DynamicCache`.

    Both take `batch_repeat_interleave(G)` after the prompts were read.
    """
    layers = [m for m in model.modules() if isinstance(m, Qwen3MoeAttention)]
    if layers and all(_is_ours(vars(layer).get("forward")) for layer in layers):
        return GroupCache(len(layers))
    return DynamicCache(config=model.config)


def _fused_forward(module: nn.Module) -> Callable[..., Any] | None:
    if isinstance(module, Qwen3MoeRMSNorm):
        return rms_norm_forward
    if isinstance(module, Qwen3MoeAttention) and _plain(module):
        return attention_forward
    return None


def _plain(attention: Any) -> bool:
    """Whether the projections are plain matrices, with no bias, adapter, window or odd head."""
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    return (
        all(type(p) is nn.Linear and p.bias is None for p in projections)
        and attention.sliding_window is None
        and attention.head_dim % 2 == 0
    )


def _is_ours(forward: Any) -> bool:
    return getattr(forward, "__func__", None) in (rms_norm_forward, attention_forward)
