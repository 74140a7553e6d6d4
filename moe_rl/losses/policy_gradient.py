"""The policy gradient, without any importance ratio."""

from torch import Tensor

from moe_rl.losses.base import LossInputs


def policy_gradient_loss(inputs: LossInputs) -> Tensor:
    """REINFORCE with group advantages, as if every update were on policy.

        l_it = -A_i log pi_it

    Source: Williams, "Simple statistical gradient-following algorithms" (1992). Equal in gradient
    to GRPO on policy, where w = 1.
    """
    return -inputs.advantages * inputs.logprobs
