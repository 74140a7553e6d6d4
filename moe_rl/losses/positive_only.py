"""Positive advantages only: bad responses are ignored, not pushed down."""

from torch import Tensor

from moe_rl.losses.base import LossInputs, clipped_surrogate


def positive_only_loss(
    inputs: LossInputs, *, clip_low: float = 0.2, clip_high: float = 0.27
) -> Tensor:
    """GRPO's loss with max(A_i, 0) for A_i.

    Source: the control of WAPO (arXiv 2606.16154). Never a no-op: about half the tokens are left
    out.
    """
    return -clipped_surrogate(inputs.log_ratio, inputs.advantages.clamp(min=0), clip_low, clip_high)
