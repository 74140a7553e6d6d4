"""Several processes: ranks, the prompts that each has, and the policy wrapped for them."""

from moe_rl.parallel.ranks import Ranks, join
from moe_rl.parallel.share import Share
from moe_rl.parallel.wrapped import Parallelism, Wrapped, clip_gradients, like, whole_tensor

__all__ = [
    "Parallelism",
    "Ranks",
    "Share",
    "Wrapped",
    "clip_gradients",
    "join",
    "like",
    "whole_tensor",
]
