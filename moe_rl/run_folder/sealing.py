"""Folders that are whole or absent: filled under another name, sealed by a manifest, renamed.

    manifest.json   sizes and sha256 of all other files, whatever else the writer says about the
                    folder, and sha256 of all that; written last, after their bytes are on the disk
    ...             what the writer fills in

A process that dies at any moment leaves what was there before.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from moe_rl.run_folder.disk import writes_to
from moe_rl.runtime.json_text import parse_json

MANIFEST = "manifest.json"
SCRATCH = ".partial-"
DAMAGED = ".damaged-"
SEAL = "seal"
# Seconds, far more than any folder takes to fill.
_ABANDONED_AFTER = 86400.0


class Damaged(Exception):
    """A folder is not what was written; names the file."""


def write_sealed(
    path: Path,
    fill: Callable[[Path], None],
    about: Mapping[str, Any],
    *,
    keep_whole: bool = False,
) -> None:
    """Make the folder `path`, in place of one that is there.

    Args:
        path: its parent is made if need be.
        fill: writes files and folders into the path it is given.
        about: goes into the manifest.
        keep_whole: leave alone a whole folder that another process has made meanwhile, since one
            may be reading it, and set a damaged one aside.

    Raises:
        OSError: it could not be written (a full disk); what was there is untouched.
    """
    parent = path.parent
    parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(parent)
    scratch = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=parent))
    try:
        with writes_to(scratch):
            fill(scratch)
        files = {str(file.relative_to(scratch)): _sealed(file) for file in _files(scratch)}
        manifest = {**about, "files": files}
        manifest[SEAL] = seal_of(manifest)
        write_flushed(scratch / MANIFEST, json.dumps(manifest, indent=2) + "\n")
        _flush_folders(scratch)
        if not keep_whole:
            shutil.rmtree(path, ignore_errors=True)
        elif is_whole(path):
            return
        else:
            set_aside(path)
        try:
            os.replace(scratch, path)
        except OSError:
            if not (keep_whole and is_whole(path)):
                raise
        flush(parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _remove_abandoned(parent: Path) -> None:
    """Remove what processes left that died while they wrote; others may be writing there now."""
    for left in parent.glob(f"{SCRATCH}*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _ABANDONED_AFTER:
                shutil.rmtree(left, ignore_errors=True)


def read_manifest(path: Path) -> dict[str, Any]:
    """What the writer said about a folder; its files may be damaged.

    Raises:
        Damaged: no manifest, or one that was changed.
    """
    try:
        manifest = parse_json((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Damaged(f"{path / MANIFEST}: cannot be read ({error})") from error
    if not isinstance(manifest, dict):
        raise Damaged(f"{path / MANIFEST}: not a manifest")
    if manifest.pop(SEAL, None) != seal_of(manifest):
        raise Damaged(f"{path / MANIFEST}: not what was written (sha256 differs)")
    return manifest


def seal_of(manifest: Mapping[str, Any]) -> str:
    """sha256 of what a manifest says, but for the seal itself."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def verify(path: Path, manifest: Mapping[str, Any]) -> None:
    """Compare every file with its size and sha256.

    Raises:
        Damaged: a file is missing, short or changed, or was not there when the folder was written:
            libraries look for files by name. Hidden ones, which systems leave, do not count.
    """
    for name, expected in manifest["files"].items():
        _verify_file(path / name, expected)
    for file in _files(path):
        inside = file.relative_to(path)
        known = str(inside) in (*manifest["files"], MANIFEST)
        if not known and not any(part.startswith(".") for part in inside.parts):
            raise Damaged(f"{file}: not a file of this folder")


def set_aside(path: Path) -> None:
    """Rename a damaged folder, if it is there, to .damaged-NAME; an older one of these is gone."""
    if path.exists():
        for older in path.parent.glob(f"{DAMAGED}*"):
            shutil.rmtree(older, ignore_errors=True)
        os.replace(path, path.with_name(f"{DAMAGED}{path.name}"))


def is_whole(path: Path) -> bool:
    """Whether a folder is there, as it was written."""
    try:
        verify(path, read_manifest(path))
    except Damaged:
        return False
    return True


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _sealed(file: Path) -> dict[str, Any]:
    """Size and sha256 of a file whose bytes are on the disk."""
    flush(file)
    return {"size": file.stat().st_size, "sha256": sha256_of(file)}


def _verify_file(file: Path, expected: dict[str, Any]) -> None:
    try:
        size = file.stat().st_size
        if size != expected["size"]:
            raise Damaged(f"{file}: {size} bytes of {expected['size']}")
        if sha256_of(file) != expected["sha256"]:
            raise Damaged(f"{file}: not what was written (sha256 differs)")
    except OSError as error:
        raise Damaged(f"{file}: cannot be read ({error.strerror})") from error


def sha256_of(file: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal digits."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def write_flushed(path: Path, text: str) -> None:
    """Write a file whose bytes are on the disk when this returns."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _flush_folders(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_dir():
            flush(path)
    flush(folder)


def flush(path: Path) -> None:
    """Have a file's or a folder's contents on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
