"""What the config's `routing_replay` means: which routes each pass of training replays.

    routing_replay   old pass (old log-probs)      updates
    disabled         its own live choice           their own live choice
    R2               its own live choice           what the old pass chose
    R3               what the engine chose         what the engine chose

The names are verl's; R3 is arXiv 2510.11370.
"""

from dataclasses import dataclass

from torch import Tensor

from moe_rl.config import RoutingReplay


@dataclass(frozen=True)
class ReplayPlan:
    """The record that each pass replays; int16 [B, Sp + T, L, K] each."""

    mode: RoutingReplay

    @property
    def is_on(self) -> bool:
        """Whether the updates replay their record."""
        return self.mode != "disabled"

    def old_pass_record(self, engine_routes: Tensor | None) -> Tensor | None:
        """What the old pass replays; None: its live choice."""
        return engine_routes if self.mode == "R3" else None

    def update_record(self, engine_routes: Tensor | None, old_routes: Tensor) -> Tensor:
        """What the updates replay. While replay is off, only the attribution forward replays it."""
        if self.mode != "R3":
            return old_routes
        assert engine_routes is not None, "the config allows R3 with engines that record only"
        return engine_routes
