"""Fused layers: the same maths as transformers' Qwen3-MoE layers in fewer passes, for CPUs."""

from moe_rl.cpu.group_cache import GroupCache
from moe_rl.cpu.memory import keep_freed_memory
from moe_rl.cpu.reading import attention_is_fused, new_cache, read_in_one_pass
from moe_rl.cpu.swap import FUSED, choose_layers, restore_layers, use_fused_layers

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
