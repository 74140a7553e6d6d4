"""The choice of a rollout engine.

cached   the policy itself with a key-value cache (cached.py): the default
vllm     vLLM on a copy of the weights (vllm.py): the extra `vllm`

Either samples with rounded weights where `rollout_precision` asks for it (precision.py), but for
vLLM in bf16: it rounds the weights itself and computes in bfloat16 too.
"""

from typing import Any

import torch

from moe_rl.config import EngineName, RolloutPrecision
from moe_rl.policy.policy import Policy
from moe_rl.rollout.cached import CachedEngine
from moe_rl.rollout.precision import RoundedEngine, find_weights
from moe_rl.rollout.request import Engine


def make_engine(
    name: EngineName, policy: Policy, precision: RolloutPrecision = "float32"
) -> Engine:
    """The engine of that name, sampling with the weights of `policy`, rounded to `precision`.

    Raises:
        ConfigError: its package is not installed.
    """
    if name == "vllm":
        from moe_rl.rollout.vllm import VllmEngine

        if precision == "bf16":
            return VllmEngine(policy, torch.bfloat16)
        engine: Engine = VllmEngine(policy)
    else:
        engine = CachedEngine(policy)
    return engine if precision == "float32" else RoundedEngine(engine, policy.model, precision)


def check_engine(
    name: EngineName, model: Any, precision: RolloutPrecision, *, trained: bool = True
) -> None:
    """Refuse a model that the engine cannot sample from, again after its weights have changed.

    Args:
        trained: whether they will change.

    Raises:
        ConfigError: see `find_weights` and, for vLLM, `check_model`.
    """
    find_weights(model, precision)
    if name == "vllm":
        from moe_rl.rollout.vllm import check_model

        check_model(model, trained=trained, bf16=precision == "bf16")


def describe_numerics(name: EngineName, precision: RolloutPrecision, dtype: torch.dtype) -> str:
    """What an engine computes with, for the log: `dtype` is the policy's."""
    arithmetic = str(dtype).removeprefix("torch.")
    if name == "vllm" and precision == "bf16":
        return "weights and arithmetic bfloat16"
    if precision == "float32":
        return f"weights and arithmetic {arithmetic}"
    return f"weights rounded to {precision}, arithmetic {arithmetic}"
