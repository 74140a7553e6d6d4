"""The choice of a rollout engine.

cached   the policy itself with a key-value cache (cached.py): the default
vllm     vLLM on a copy of the weights (vllm.py): the extra `vllm`
"""

from moe_rl.config import EngineName
from moe_rl.policy.policy import Policy
from moe_rl.rollout.cached import CachedEngine
from moe_rl.rollout.request import Engine


def make_engine(name: EngineName, policy: Policy) -> Engine:
    """The engine of that name, sampling with the weights of `policy`.

    Raises:
        ConfigError: its package is not installed.
    """
    if name == "vllm":
        from moe_rl.rollout.vllm import VllmEngine

        return VllmEngine(policy)
    return CachedEngine(policy)
