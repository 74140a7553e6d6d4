"""Checkpoints of a run: what it takes to resume it, written between two rollout steps.

    checkpoints/
      latest           name of the newest checkpoint
      00012/           after 12 rollout steps: a sealed folder, see sealing.py
        manifest.json  with the reward that the best checkpoint is chosen by
        ...            what training/state.py writes

The two newest and the best one stay. Reading verifies every file, and falls back to the newest
checkpoint that is whole.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from moe_rl.config import ConfigError
from moe_rl.run_folder.sealing import MANIFEST, Damaged, Fill, flush, read_sealed, write_sealed

LATEST = "latest"
_NEWEST_KEPT = 2  # one to fall back to if the newest is damaged


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: made when the first is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, step: int) -> Path:
        """Folder of the checkpoint after `step` rollout steps."""
        return self.folder / f"{step:05d}"

    def write(self, step: int, fill: Fill, *, reward: float) -> None:
        """Write one checkpoint, make it the latest, and remove those that need not be kept.

        Args:
            step: rollout steps that are done.
            fill: writes the contents into the path it is given.
            reward: the best checkpoint is the one with the largest.

        Raises:
            OSError: it could not be written (a full disk); the others are untouched.
        """
        write_sealed(self.path(step), fill, {"step": step, "reward": reward})
        temporary = self.folder / f".{LATEST}"
        temporary.write_text(self.path(step).name + "\n", encoding="utf-8")
        flush(temporary)
        os.replace(temporary, self.folder / LATEST)
        flush(self.folder)
        self._prune()

    def newest(self, on_damage: Callable[[str], None]) -> Path | None:
        """The newest whole checkpoint; None if there is no checkpoint at all.

        Args:
            on_damage: told about each checkpoint that had to be passed over, and its bad file.

        Raises:
            ConfigError: there are checkpoints, and none is whole.
        """
        paths = self.newest_first()
        for path in paths:
            try:
                read_sealed(path)
            except Damaged as damage:
                on_damage(f"{damage}; falling back to an older checkpoint")
            else:
                return path
        if paths:
            raise ConfigError(
                f"{self.folder}: no checkpoint is whole; remove the folder to start the run anew"
            )
        return None

    def _all(self) -> list[Path]:
        paths = (path for path in self.folder.glob("*") if path.name.isdigit())
        return sorted(paths, key=lambda path: int(path.name), reverse=True)

    def newest_first(self) -> list[Path]:
        """From `latest` on: after falling back, the run has not reached those beyond it again."""
        paths = self._all()
        with contextlib.suppress(OSError, ValueError):
            latest = int((self.folder / LATEST).read_text(encoding="utf-8"))
            paths = [path for path in paths if int(path.name) <= latest]
        return paths

    def _prune(self) -> None:
        paths = self.newest_first()
        kept, rewards = set(paths[:_NEWEST_KEPT]), {}
        for path in paths:
            with contextlib.suppress(OSError, ValueError, KeyError):
                manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
                rewards[path] = manifest["reward"]
        kept.add(max(rewards, key=lambda path: rewards[path]))  # of equal ones the newest
        for path in self._all():
            if path not in kept:
                shutil.rmtree(path, ignore_errors=True)
