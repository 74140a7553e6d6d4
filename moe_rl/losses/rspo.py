"""RSPO: a token whose routers have moved counts less."""

from torch import Tensor

from moe_rl.losses.base import LossInputs, clipped_surrogate


def rspo_loss(
    inputs: LossInputs, *, clip_low: float = 0.2, clip_high: float = 0.27, lowest: float = 0.7
) -> Tensor:
    """GRPO's loss, weighted by how little the routers have moved on the old policy's experts.

        l_it = -max(gamma_it, lowest) min(w_it A_i, clip(w_it, 1 - low, 1 + high) A_i)
        gamma_it   `inputs.router_shift`, in (0, 1]

    Source: RSPO (arXiv 2510.23027). A no-op in a dense model, or where no router has moved.
    """
    assert inputs.router_shift is not None, "the learner records routers for a loss that reads them"
    surrogate = clipped_surrogate(inputs.log_ratio, inputs.advantages, clip_low, clip_high)
    return -inputs.router_shift.clamp(min=lowest) * surrogate
