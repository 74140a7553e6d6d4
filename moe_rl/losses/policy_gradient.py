"""The policy gradient, without any importance ratio."""

import torch
from torch import Tensor

from moe_rl.losses.base import LossInputs, weighted_logprobs


def policy_gradient_loss(inputs: LossInputs) -> Tensor:
    """REINFORCE with group advantages, as if every update were on policy.

        l_it = -A_i log pi_it

    Leaving out the ratio is a no-op on policy, where w = 1: the gradient is then GRPO's.

    Source: Williams, "Simple statistical gradient-following algorithms for connectionist
    reinforcement learning" (1992).
    """
    return -weighted_logprobs(inputs, torch.ones_like(inputs.advantages))
