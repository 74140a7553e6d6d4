"""A run that met a number that is not finite: what it leaves behind.

    crash/00012-03/        like a checkpoint before update 3 of rollout step 12, and beside it
      config.json          of the run
      crash.json           what was not finite, the update's metrics, how many processes there were
      rollout.safetensors  tokens, advantages, routes, old log-probs; absent if the rollout
                           itself was not finite

The random draws are a function of the config's seed and of the step. `moe-rl replay-crash` makes
the update again.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from moe_rl.config import SCHEMA, RunConfig
from moe_rl.run_folder.checkpoints import point_in_time
from moe_rl.run_folder.log import write_config, write_json
from moe_rl.run_folder.sealing import write_sealed
from moe_rl.training.state import Fill, Progress

CONFIG, CRASH = "config.json", "crash.json"


@dataclass(frozen=True, kw_only=True)
class Crash:
    """Where and why a run met a number that is not finite.

    The weights are those before the update.
    """

    folder: Path
    """Of the run."""
    config: RunConfig
    progress: Progress
    """Of the update that was not made."""
    reason: str
    metrics: dict[str, Any]
    """The update's line in the log."""

    @property
    def bundle(self) -> Path:
        """Folder of what it takes to make the update again."""
        return self.folder / "crash" / point_in_time(self.progress.step, self.progress.update)

    def write(self, fill: Fill, *, processes: int) -> None:
        """Write the bundle; `fill` writes the state of the run.

        Raises:
            OSError: it could not be written.
        """

        def fill_all(path: Path) -> None:
            fill(path)
            write_config(path / CONFIG, self.config)
            about = {
                "schema": SCHEMA,
                "reason": self.reason,
                "metrics": self.metrics,
                "processes": processes,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            }
            write_json(path / CRASH, about)

        write_sealed(self.bundle, fill_all, {"schema": SCHEMA})

    def describe(self) -> str:
        """One line for the user."""
        progress = self.progress
        where = f"rollout step {progress.step}"
        if progress.begun is not None:
            where += f", update {progress.update}"
        return (
            f"{where}: {self.reason}; the run has diverged at learning_rate="
            f"{self.config.learning_rate:g}, take a smaller one, or see what happened: "
            f"moe-rl replay-crash {self.bundle}"
        )


class NonFinite(FloatingPointError):
    """The run was stopped before it learnt from numbers that are not finite."""

    def __init__(self, crash: Crash) -> None:
        super().__init__(crash.describe())
        self.crash = crash
