"""Fused layers: the same maths as transformers' Qwen3-MoE layers in fewer passes, for CPUs."""

from moe_rl.fused_layers.group_cache import GroupCache
from moe_rl.fused_layers.memory import keep_freed_memory
from moe_rl.fused_layers.reading import attention_is_fused, new_cache, read_in_one_pass
from moe_rl.fused_layers.swap import FUSED, choose_layers, restore_layers, use_fused_layers

__all__ = [
    "FUSED",
    "GroupCache",
    "attention_is_fused",
    "choose_layers",
    "keep_freed_memory",
    "new_cache",
    "read_in_one_pass",
    "restore_layers",
    "use_fused_layers",
]
