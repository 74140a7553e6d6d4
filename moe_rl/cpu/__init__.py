"""The CPU fast path: an optimisation that a first reading can skip.

Everything here computes what transformers computes, value and gradient, up to rounding, and the
tests hold it to that: Qwen3-MoE layers in fewer passes over the data, a key-value cache that keeps
a prompt once for all its responses, and one forward pass over prompts and responses together.
`FastPath(model)` is the only door; without it the same training runs on transformers' own layers.
"""

from moe_rl.cpu.fast_path import FastPath

__all__ = ["FastPath"]
