"""What a run that met NaN or inf leaves behind: its crash bundle, a sealed folder.

    crash/00012-03/        update 3 of rollout step 12
      config.json          of the run
      crash.json           step, update, what was NaN or inf, the update's metrics, versions
      policy/              the weights before the update
      rollout.safetensors  tokens, advantages, routes, old log-probs; absent if sampling met NaN
                           or inf, in the rollout or in the evaluation

The random draws are a function of the config's seed and of the step, so that this suffices to redo
the update: `moe-rl debug-crash`.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_rl.batch import Experience, RolloutBatch
from moe_rl.config import SCHEMA, RunConfig
from moe_rl.run_folder.log import write_config, write_json
from moe_rl.run_folder.sealing import Fill, write_sealed
from moe_rl.training.learner import Learner
from moe_rl.training.state import POLICY

CONFIG, CRASH = "config.json", "crash.json"
_ROLLOUT = "rollout.safetensors"


@dataclass(frozen=True, kw_only=True)
class Crash:
    """Where and why a run met NaN or inf."""

    folder: Path
    """Run folder."""
    config: RunConfig
    step: int
    """Rollout step."""
    update: int
    """Update of that step, which was not made; 0 too if the rollout failed, and behind the last one
    if the evaluation did."""
    reason: str
    metrics: dict[str, Any]
    """The update's line in the log."""

    @property
    def bundle(self) -> Path:
        """Folder of what it takes to redo the update."""
        return self.folder / "crash" / f"{self.step:05d}-{self.update:02d}"

    def write(self, fill_policy: Fill, experience: dict[str, Tensor], *, processes: int) -> None:
        """Write the bundle, from the weights before the update and its rollout.

        Raises:
            OSError: it could not be written.
        """

        def fill(path: Path) -> None:
            fill_policy(path / POLICY)
            if experience:
                save_file(experience, path / _ROLLOUT)
            write_config(path / CONFIG, self.config)
            about = {
                "schema": SCHEMA,
                "step": self.step,
                "update": self.update,
                "reason": self.reason,
                "metrics": self.metrics,
                "processes": processes,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            }
            write_json(path / CRASH, about)

        write_sealed(self.bundle, fill, {"schema": SCHEMA})

    def describe(self) -> str:
        """One line for the user."""
        return (
            f"rollout step {self.step}, update {self.update}: {self.reason}; the run has diverged "
            f"at learning_rate={self.config.learning_rate:g}, take a smaller one, or see what "
            f"happened: moe-rl debug-crash {self.bundle}"
        )


class NonFinite(FloatingPointError):
    """The run was stopped before it learnt from NaN or inf."""

    def __init__(self, crash: Crash) -> None:
        super().__init__(crash.describe())
        self.crash = crash


def collect_experience(experience: Experience | None, learner: Learner) -> dict[str, Tensor]:
    """The rollout of all ranks, prompt by prompt, as tensors of a file; all ranks call this."""
    if experience is None:
        return {}
    own = {
        prefix + entry.name: getattr(part, entry.name)
        for prefix, part in (("", experience), ("batch.", experience.batch))
        for entry in dataclasses.fields(part)
    }
    rows = {name: value for name, value in own.items() if isinstance(value, Tensor)}
    order = learner.share.order()
    return {
        # Replay and record may be one tensor; indexing gives a file each its own.
        name: whole.unflatten(0, (len(order), -1))[order].flatten(0, 1).contiguous()
        for name, whole in learner.ranks.gather(rows).items()
    }


def load_experience(bundle: Path, device: torch.device) -> Experience | None:
    """The rollout of a crash bundle; None if the rollout itself was NaN or inf."""
    if not (bundle / _ROLLOUT).is_file():
        return None
    tensors: dict[str, Any] = load_file(bundle / _ROLLOUT, device=str(device))
    names = [field.name for field in dataclasses.fields(RolloutBatch)]
    batch = RolloutBatch(**{name: tensors.pop(f"batch.{name}", None) for name in names})
    return Experience(batch=batch, **tensors)
