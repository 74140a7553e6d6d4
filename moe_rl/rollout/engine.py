"""The choice of a rollout engine.

cached   the policy itself with a key-value cache (cached.py): the default
vllm     vLLM on a copy of the weights (vllm.py): the extra `vllm`

Either samples with rounded weights where `rollout_precision` asks for it (precision.py).
"""

from moe_rl.config import EngineName, RolloutPrecision
from moe_rl.policy.policy import Policy
from moe_rl.rollout.cached import CachedEngine
from moe_rl.rollout.precision import RoundedEngine
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

        engine: Engine = VllmEngine(policy)
    else:
        engine = CachedEngine(policy)
    return engine if precision == "float32" else RoundedEngine(engine, policy.model, precision)
