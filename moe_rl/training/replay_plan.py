"""What the config's `routing_replay` means: which routes each pass of training replays.

    routing_replay   old pass (old log-probs)      updates
    disabled         its own live choice           their own live choice
    R2               its own live choice           what the old pass chose
    R3               what the engine chose         what the engine chose
    TRR              what the engine chose, with   the same
                     the engine's gate weights

The first names are verl's; R3 is arXiv 2510.11370. TRR is from PrimeIntellect's prime-rl (#3509 and
#3523): as nothing that routers compute is left in the log-probs, they are not trained.
"""

from dataclasses import dataclass

from torch import Tensor

from moe_rl.batch import RolloutBatch
from moe_rl.config import RoutingReplay


@dataclass(frozen=True)
class ReplayPlan:
    """The record that each pass replays; [B, Sp + T, L, K] of int16 ids and float32 weights."""

    mode: RoutingReplay

    @property
    def is_on(self) -> bool:
        """Whether the updates replay their record."""
        return self.mode != "disabled"

    @property
    def replays_engine(self) -> bool:
        """Whether the record is the rollout engine's."""
        return self.mode in ("R3", "TRR")

    @property
    def replays_weights(self) -> bool:
        """Whether the engine's gate weights are replayed with its choices."""
        return self.mode == "TRR"

    @property
    def contrasts(self) -> tuple["ReplayPlan", ...]:
        """The plans of the extra passes that the log-ratio is split by.

        The first turns replay off where it is on and on where it is off; of TRR a second replays
        the ids alone.
        """
        if not self.is_on:
            return (ReplayPlan("R2"),)
        live = ReplayPlan("disabled")
        return (live, ReplayPlan("R3")) if self.replays_weights else (live,)

    def old_pass_record(self, engine_routes: Tensor) -> Tensor | None:
        """What the old pass replays; None: its live choice."""
        return engine_routes if self.replays_engine else None

    def update_record(self, engine_routes: Tensor, old_routes: Tensor) -> Tensor:
        """What the updates replay. While replay is off, only the attribution forward replays it."""
        return engine_routes if self.replays_engine else old_routes

    def gate_weights(self, batch: RolloutBatch) -> Tensor | None:
        """Gate weights that the old pass and the updates replay; None: those of their routers."""
        return batch.gate_weights if self.replays_weights else None
