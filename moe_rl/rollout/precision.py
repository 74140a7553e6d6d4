"""Rollouts with rounded weights: an engine of lower precision, without its kernels.

Weights are rounded to values of the format and back, so that sampling keeps the policy's own
arithmetic: the difference from the trainer is the rounding of weights and nothing else.

    bf16        all parameters, to the nearest bfloat16
    fp8         e4m3: w = s * f, f a float8_e4m3fn, s = max |w| / 448 of the output channel
    int8, int4  w = s * n, n an integer in [-q, q], s = max |w| / q of the channel, q = 127 and 7

All formats round to nearest, ties to even. fp8, int8 and int4 apply to the linear layers of
attention and MLP and to the experts, each expert with scales of its own. Router, embeddings, norms,
biases, head and the gate of a shared expert stay as they are: what llm-compressor's examples for
MoE models ignore (examples/quantizing_moe: `lm_head`, `mlp.gate`, `mlp.shared_expert_gate`).
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_rl.batch import RolloutBatch
from moe_rl.config import ConfigError, RolloutPrecision
from moe_rl.rollout.request import Engine, Request
from moe_rl.routing import find_routers

# Largest magnitude that the format has, in steps of a channel's scale.
_LARGEST = {"fp8": 448.0, "int8": 127.0, "int4": 7.0}


@dataclass(frozen=True)
class RoundedEngine:
    """An engine that samples from `model` with rounded weights; see `rounded_weights`."""

    engine: Engine
    model: Any
    precision: RolloutPrecision

    def sample(self, request: Request) -> RolloutBatch:
        """See `Engine`."""
        with rounded_weights(self.model, self.precision):
            return self.engine.sample(request)


@contextlib.contextmanager
def rounded_weights(model: Any, precision: RolloutPrecision) -> Iterator[None]:
    """Within the block the model's parameters hold rounded values; after it, their own storage.

    The original storage is never written, so that the weights come back bit for bit, whatever
    happens in the block. The rounded copy takes as much memory as the weights it replaces.

    Raises:
        ConfigError: see `find_weights`.
    """
    weights = find_weights(model, precision)
    own = [(parameter, parameter.data) for parameter, _ in weights]
    try:
        for parameter, input_axis in weights:
            parameter.data = round_weight(parameter.data, precision, input_axis=input_axis)
        yield
    finally:
        for parameter, data in own:
            parameter.data = data


def round_weight(weight: Tensor, precision: RolloutPrecision, *, input_axis: int = -1) -> Tensor:
    """The nearest values that `weight` can have in `precision`, in the type of `weight`.

    A channel is all that differs along `input_axis` alone: a row of a matrix [out, in], one output
    of one expert in [E, out, in].
    """
    if precision == "float32":
        return weight
    if precision == "bf16":
        return weight.to(torch.bfloat16).to(weight.dtype)
    # In float64: a channel's largest weight comes back exactly, and with it the scale, so that
    # rounding twice is rounding once.
    exact = weight.double()
    scale = exact.abs().amax(dim=input_axis, keepdim=True) / _LARGEST[precision]
    steps = exact / scale.clamp(min=torch.finfo(torch.float64).tiny)  # a channel of zeros stays so
    steps = steps.to(torch.float8_e4m3fn).double() if precision == "fp8" else steps.round()
    return (steps * scale).to(weight.dtype)


def find_weights(model: Any, precision: RolloutPrecision) -> list[tuple[Tensor, int]]:
    """The parameters of a causal LM that `precision` rounds, each with the axis of its inputs.

    Raises:
        ConfigError: fp8, int8 or int4 of a model whose experts are not in transformers'
            ExpertsInterface, so that nothing says which axis is which.
    """
    if precision == "float32":
        return []
    if precision == "bf16":
        return [(parameter, -1) for parameter in model.parameters()]
    taps = find_routers(model)
    kept = {id(module) for tap in taps for module in tap.module.modules()}
    kept.add(id(model.get_output_embeddings()))
    found, layers = list[tuple[Tensor, int]](), 0
    for name, module in model.named_modules():
        if id(module) in kept or name.endswith("shared_expert_gate"):
            continue
        if hasattr(module, "is_transposed"):  # what `use_experts_implementation` adds to a class
            layers += 1
            axis = -2 if module.is_transposed else -1
            # Of three axes: biases [E, out] have two.
            found += [(p, axis) for p in module.parameters(recurse=False) if p.ndim == 3]
        elif isinstance(module, nn.Linear):
            found.append((module.weight, -1))
    if layers < len(taps):
        raise ConfigError(
            f"rollout_precision={precision}: {type(model).__name__} has {len(taps)} routers and "
            f"{layers} layers of experts in transformers' ExpertsInterface, the others would stay "
            "unrounded; use bf16 or float32"
        )
    return found
