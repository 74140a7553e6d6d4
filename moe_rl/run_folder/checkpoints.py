"""Checkpoints of a run: what it needs to go on, in a sealed folder a point in time.

    checkpoints/
      latest           name of the newest one, moved here by rename
      00012-03/        before update 3 of rollout step 12
        manifest.json  what the folder is, and sizes and sha256 of its files
        ...            whatever the run fills in

Reading verifies, and goes back to the newest one that is whole; those passed over are set aside
as .damaged-NAME. See `sealed.py`.
"""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moe_rl.config import SCHEMA, ConfigError, check_schema
from moe_rl.run_folder.sealing import (
    DAMAGED,
    MANIFEST,
    SCRATCH,
    Damaged,
    flush,
    read_manifest,
    set_aside,
    verify,
    write_flushed,
    write_sealed,
)

LATEST = "latest"
_LEAST_KEPT = 2


def point_in_time(step: int, update: int) -> str:
    """Name of a folder that holds the state before an update of a rollout step; names sort."""
    return f"{step:05d}-{update:02d}"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One checkpoint on disk."""

    path: Path
    step: int
    """Rollout step that it lies in."""
    update: int
    """Updates of that step already made; 0: before its rollout."""
    score: float
    """What the best is chosen by: larger is better."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: made when the first is written.
        identity: what the run is, as text; a checkpoint of another is refused.
        keep_last: how many of the newest stay beside the best one, at least 2.

    Raises:
        ConfigError: fewer than 2 are to be kept.
    """

    def __init__(self, folder: Path, *, identity: str, keep_last: int = _LEAST_KEPT) -> None:
        if keep_last < _LEAST_KEPT:
            raise ConfigError(
                f"keep_last={keep_last}: at least {_LEAST_KEPT}, or a damaged newest checkpoint "
                "would leave none"
            )
        self.folder = folder
        self.keep_last = keep_last
        self._damaged: list[Path] = []
        self._identity = hashlib.sha256(identity.encode()).hexdigest()

    def write(
        self, step: int, update: int, fill: Callable[[Path], None], *, score: float
    ) -> Checkpoint:
        """Write one checkpoint, make it the latest, and remove those that need not be kept.

        Args:
            step, update: where the run stands, see `Checkpoint`.
            fill: writes files and folders into the path it is given.
            score: see `Checkpoint`.

        Raises:
            OSError: it could not be written (a full disk); those that were there are untouched.
        """
        for left in self.folder.glob(f"{SCRATCH}*"):  # of a process that died
            shutil.rmtree(left, ignore_errors=True)
        path = self.path(step, update)
        about = {
            "schema": SCHEMA,
            "identity": self._identity,
            "step": step,
            "update": update,
            "score": score,
        }
        write_sealed(path, fill, about)
        self._point_to(path)
        self._prune()
        return Checkpoint(path=path, step=step, update=update, score=score)

    def path(self, step: int, update: int) -> Path:
        """Where the checkpoint of a point in time is."""
        return self.folder / point_in_time(step, update)

    def newest(self, on_damage: Callable[[str], None]) -> Checkpoint | None:
        """The newest whole checkpoint, None if there is none at all.

        Args:
            on_damage: told about each one that had to be passed over, and its bad file.

        Raises:
            ConfigError: a checkpoint of another run or of a newer version of the project, or
                checkpoints of which none is whole.
        """
        damaged = []
        for path in self._newest_first():
            try:
                return self._read(path)
            except Damaged as damage:
                self._damaged.append(path)
                damaged.append(str(damage))
                on_damage(
                    f"{damage}; going back to an older checkpoint, this one is set aside as "
                    f"{DAMAGED}{path.name}"
                )
        if damaged:
            raise ConfigError(
                f"{self.folder}: no checkpoint is whole ({damaged[0]}); remove the folder to start "
                "the run anew"
            )
        return None

    def _newest_first(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        paths = [path for path in self.folder.iterdir() if path.is_dir() and path.name[0] != "."]
        paths.sort(key=lambda path: path.name, reverse=True)
        # After going back the run may stand behind a checkpoint that it has not reached again.
        with contextlib.suppress(OSError, UnicodeDecodeError):
            latest = self.folder / (self.folder / LATEST).read_text(encoding="utf-8").strip()
            if latest in paths:
                paths.remove(latest)
                paths.insert(0, latest)
        return paths

    def _read(self, path: Path) -> Checkpoint:
        manifest = read_manifest(path)
        check_schema(manifest.get("schema"), path / MANIFEST)
        if manifest.get("identity") != self._identity:
            raise ConfigError(f"{path}: a checkpoint of another run; give the folder of this one")
        verify(path, manifest)
        return Checkpoint(
            path=path, step=manifest["step"], update=manifest["update"], score=manifest["score"]
        )

    def set_damaged_aside(self) -> None:
        """Rename what was passed over, so that it takes no whole one's place among those kept.

        Before the logs are cut: whole again, it would be ahead of them.
        """
        for path in self._damaged:
            set_aside(path)
        self._damaged.clear()

    def _point_to(self, path: Path) -> None:
        temporary = self.folder / f"{SCRATCH}{LATEST}"
        write_flushed(temporary, path.name + "\n")
        os.replace(temporary, self.folder / LATEST)
        flush(self.folder)

    def _prune(self) -> None:
        """Remove all but the newest `keep_last` and the best; what cannot be read is not best."""
        paths = self._newest_first()
        kept = set(paths[: self.keep_last])
        scores = {}
        for path in paths:
            with contextlib.suppress(Damaged):
                scores[path] = float(read_manifest(path)["score"])
        if scores:
            kept.add(max(scores, key=lambda path: (scores[path], path.name)))
        for path in paths:
            if path not in kept:
                shutil.rmtree(path, ignore_errors=True)
