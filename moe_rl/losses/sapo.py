"""SAPO: a soft gate on the ratio instead of a clip."""

import torch
from torch import Tensor

from moe_rl.losses.base import LossInputs


def sapo_loss(
    inputs: LossInputs, *, tau_positive: float = 1.0, tau_negative: float = 1.05
) -> Tensor:
    """The gradient of a token fades as its ratio leaves 1, on either side.

        l_it = -4/tau sigmoid(tau (w_it - 1)) A_i,  tau = tau_positive where A_i > 0, else negative

    The gate is a no-op on policy, where its gradient is the policy gradient.

    Source: SAPO (arXiv 2511.20347), eq. 5-6, with its temperatures.
    """
    tau = torch.full_like(inputs.advantages, tau_negative)
    tau = tau.masked_fill(inputs.advantages > 0, tau_positive)
    # From e^30 on the gate is 1 and flat; exp would overflow to inf, and its gradient to NaN.
    ratio = inputs.log_ratio.clamp(max=30.0).exp()
    return -4.0 / tau * (tau * (ratio - 1.0)).sigmoid() * inputs.advantages
