"""Fused layers: the same maths as transformers' Qwen3-MoE layers in fewer passes, for CPUs."""

from moe_rl.fused_layers.group_cache import GroupCache
from moe_rl.fused_layers.one_pass import read_in_one_pass
from moe_rl.fused_layers.swap import new_cache, restore_layers, use_fused_layers

__all__ = ["GroupCache", "new_cache", "read_in_one_pass", "restore_layers", "use_fused_layers"]
