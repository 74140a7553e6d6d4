"""PPO: a token's advantage is measured against a learned value, not against a group."""

import torch
from torch import Tensor

from moe_rl.losses.base import LossInputs, clipped_surrogate


def ppo_loss(
    inputs: LossInputs,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    value_clip: float = 0.2,
    value_coef: float = 0.1,
) -> Tensor:
    """PPO's clipped surrogate and value loss, for aggregation by `token_mean`.

        l_it = -min(w_it A_it, clip(w_it, 1 - low, 1 + high) A_it) + value_coef v_it
        A_it   whitened advantages of `losses.advantages.gae`
        v_it   `value_loss`

    Source: PPO (arXiv 1707.06347), eq. 7 and 9, without an entropy bonus; the four defaults, and a
    value head on the policy's own layers which trains them too, are those of the code of arXiv
    1909.08593 (class PpoHParams), which TRL took over. verl has a network of its own for values.
    The clip is a no-op on policy.
    """
    values, old_values, returns = inputs.values, inputs.old_values, inputs.returns
    assert values is not None and old_values is not None and returns is not None
    surrogate = clipped_surrogate(inputs.log_ratio, inputs.advantages, clip_low, clip_high)
    return value_coef * value_loss(values, old_values, returns, value_clip) - surrogate


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, value_clip: float) -> Tensor:
    """How far values are from returns, where a value that moves far from the old one gains nothing.

        v_it = 1/2 max((V_it - R_it)^2, (clip(V_it, Vold_it - c, Vold_it + c) - R_it)^2)

    Source: the code of arXiv 1909.08593; the same in TRL and in verl. All tensors and the result
    are [B, T], in reward units and their square.
    """
    clipped = old_values + (values - old_values).clamp(-value_clip, value_clip)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())
