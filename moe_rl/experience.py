"""One rollout with all that its updates need."""

from dataclasses import dataclass

from torch import Tensor

from moe_rl.batch import RolloutBatch


@dataclass(frozen=True, kw_only=True)
class Experience:
    """A scored rollout as the old policy reads it; tensors as in `RolloutBatch`."""

    batch: RolloutBatch
    advantages: Tensor
    """float32 [B]."""
    old_logprobs: Tensor
    """float32 [B, T], under the routing that the updates replay, if they replay any."""
    old_routes: Tensor
    """int16 [B, Sp + T, L, K], the old policy's live choices: what churn is measured against."""
    old_scores: Tensor | None
    """float32 [B, T, L, E], the old policy's router logits."""
    replay: Tensor
    """int16 [B, Sp + T, L, K], what replay replays (R3: the engine's record), used or not."""
