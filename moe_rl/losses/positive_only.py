"""Positive advantages only: bad responses are ignored, not pushed down."""

from torch import Tensor

from moe_rl.losses.base import LossInputs, clipped_surrogate


def positive_only_loss(inputs: LossInputs, *, clip_high: float = 0.27) -> Tensor:
    """GRPO's loss with max(A_i, 0) for A_i, which leaves one side of the clip.

        l_it = -min(w_it, 1 + high) max(A_i, 0)

    Never a no-op: the advantages of a group sum to 0, so that some are negative or all are 0.

    Source: Winner Advantage Policy Optimization (arXiv 2606.16154). The clip range is that of GRPO
    here.
    """
    return -clipped_surrogate(inputs.log_ratio, inputs.advantages.clamp(min=0), 0.0, clip_high)
