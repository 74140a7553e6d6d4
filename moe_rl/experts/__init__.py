"""Experts backends registered in transformers' ExpertsInterface, and the one choice among them."""

from moe_rl.experts import cpu_sorted, megablocks
from moe_rl.experts.choose import choose_experts, valid_experts
from moe_rl.experts.cpu_sorted import cpu_sorted_experts_forward

cpu_sorted.register()
megablocks.register()

__all__ = ["choose_experts", "cpu_sorted_experts_forward", "valid_experts"]
