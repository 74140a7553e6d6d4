"""`moe-rl map`: where each arm stays stable."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from moe_rl.commands.options import Command, StudyOptions
from moe_rl.commands.studies import INTERRUPTED, run_study
from moe_rl.experiments.arms import STORY_ARMS
from moe_rl.presets import PresetName, preset


@dataclass(frozen=True, kw_only=True)
class Map(StudyOptions, Command):
    """Map where each arm stays stable: learning rate x updates per rollout x router noise."""

    interrupted: ClassVar[str] = INTERRUPTED

    learning_rates: tuple[float, ...] = (5e-4, 7e-4, 1e-3)
    """Base learning rates; warm-up and decay multiply them."""
    updates: tuple[int, ...] = (8, 16)
    """Optimiser updates per rollout."""
    noises: tuple[float, ...] = (0.0, 0.135)
    """Router noises (logit units). Above 0, the replay arm replays the rollout engine's choices."""
    arms: tuple[str, ...] = STORY_ARMS
    """Arms to compare."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Random seeds; every arm runs with each."""
    preset: PresetName = "mild-stale"
    """Preset whose settings the map varies."""
    out: Path = Path("runs/map")
    """Study folder."""

    def run(self) -> int:
        """Run the grid."""
        from moe_rl.experiments import collapse_map

        study = collapse_map.grid(
            base=preset(self.preset),
            learning_rates=self.learning_rates,
            updates=self.updates,
            noises=self.noises,
            arms=self.arms,
            seeds=self.seeds,
        )
        return run_study(study, self.out, self)
