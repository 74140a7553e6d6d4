"""Checkpoints that are whole or absent: what a run needs to go on, in a folder a point in time.

    checkpoints/
      latest           name of the newest one, moved here by rename
      00012-03/        before update 3 of rollout step 12
        manifest.json  sizes and sha256 of all other files; written last
        ...            whatever the run fills in

A folder is filled under another name, flushed to the disk, given its manifest and renamed: a
process that dies at any moment leaves the checkpoints that were there. Reading verifies, and goes
back to the newest one that is whole.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_rl.config import SCHEMA, ConfigError

MANIFEST = "manifest.json"
LATEST = "latest"
_SCRATCH = ".partial-"
_LEAST_KEPT = 2


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
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(f"{_SCRATCH}*"):
            shutil.rmtree(left, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=self.folder))
        path = self.folder / f"{step:05d}-{update:02d}"
        try:
            fill(scratch)
            files = {str(file.relative_to(scratch)): _sealed(file) for file in _files(scratch)}
            manifest = {
                "schema": SCHEMA,
                "identity": self._identity,
                "step": step,
                "update": update,
                "score": score,
                "files": files,
            }
            _write_text(scratch / MANIFEST, json.dumps(manifest, indent=2) + "\n")
            _flush_folders(scratch)
            # One of this name is here only if it was damaged, or the run went back behind it.
            shutil.rmtree(path, ignore_errors=True)
            os.replace(scratch, path)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        self._point_to(path)
        self._prune()
        return Checkpoint(path=path, step=step, update=update, score=score)

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
            except _Damaged as damage:
                damaged.append(str(damage))
                on_damage(f"{damage}; going back to an older checkpoint")
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
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise _Damaged(f"{path / MANIFEST}: cannot be read ({error})") from error
        if isinstance(manifest, dict) and manifest.get("schema", 0) != SCHEMA:
            raise ConfigError(
                f"{path / MANIFEST}: schema {manifest.get('schema')!r}, this version reads schema "
                f"{SCHEMA}; use the version of moe-rl that wrote it"
            )
        try:
            if manifest["identity"] != self._identity:
                raise ConfigError(
                    f"{path}: a checkpoint of another run; give the folder of this one"
                )
            for name, expected in manifest["files"].items():
                _verify(path / name, expected)
            return Checkpoint(
                path=path,
                step=int(manifest["step"]),
                update=int(manifest["update"]),
                score=float(manifest["score"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise _Damaged(f"{path / MANIFEST}: not a manifest ({error!r})") from error

    def _point_to(self, path: Path) -> None:
        temporary = self.folder / f"{_SCRATCH}{LATEST}"
        _write_text(temporary, path.name + "\n")
        os.replace(temporary, self.folder / LATEST)
        _flush(self.folder)

    def _prune(self) -> None:
        """Remove all but the newest `keep_last` and the best; what cannot be read is not best."""
        paths = self._newest_first()
        kept = set(paths[: self.keep_last])
        scores = {}
        for path in paths:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
                scores[path] = float(manifest["score"])
        if scores:
            kept.add(max(scores, key=lambda path: (scores[path], path.name)))
        for path in paths:
            if path not in kept:
                shutil.rmtree(path, ignore_errors=True)


class _Damaged(Exception):
    """A checkpoint is not what was written; names the file."""


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _sealed(file: Path) -> dict[str, Any]:
    """Size and sha256 of a file whose bytes are on the disk."""
    _flush(file)
    return {"size": file.stat().st_size, "sha256": sha256_of(file)}


def _verify(file: Path, expected: dict[str, Any]) -> None:
    try:
        size = file.stat().st_size
        if size != expected["size"]:
            raise _Damaged(f"{file}: {size} bytes of {expected['size']}")
        if sha256_of(file) != expected["sha256"]:
            raise _Damaged(f"{file}: not what was written (sha256 differs)")
    except OSError as error:
        raise _Damaged(f"{file}: cannot be read ({error.strerror})") from error


def sha256_of(file: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal digits."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _flush_folders(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_dir():
            _flush(path)
    _flush(folder)


def _flush(path: Path) -> None:
    """Have a file's or a folder's contents on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
