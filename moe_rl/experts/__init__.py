"""Experts backends registered in transformers' ExpertsInterface, and the one choice among them."""

from moe_rl.experts import megablocks
from moe_rl.experts.choose import choose_experts, valid_experts

megablocks.register()

__all__ = ["choose_experts", "valid_experts"]
