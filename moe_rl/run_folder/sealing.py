"""Sealed folders: whole or absent. Filled under another name, flushed, and then renamed.

    manifest.json   size and sha256 of every other file, and what the writer says about the folder
    ...             what the writer fills in

A process that dies at any moment leaves no folder that is half written.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moe_rl.run_folder.disk import writes_to

MANIFEST = "manifest.json"

Fill = Callable[[Path], None]
"""Writes files and folders into the path it is given."""


class Damaged(Exception):
    """A sealed folder is not as it was written; the message names the bad file."""


def write_sealed(path: Path, fill: Fill, about: Mapping[str, Any]) -> None:
    """Make the folder `path`, in place of one that is there; one process at a time may.

    Args:
        path: its parent is made if need be.
        fill: writes the contents.
        about: JSON values that the manifest keeps.

    Raises:
        OSError: it could not be written (a full disk); what was there is untouched.
    """
    scratch = path.with_name(f".partial-{path.name}")
    shutil.rmtree(scratch, ignore_errors=True)  # of a process that died while it wrote
    scratch.mkdir(parents=True)
    try:
        with writes_to(scratch):
            fill(scratch)
        files = [file for file in sorted(scratch.rglob("*")) if file.is_file()]
        sealed = {str(file.relative_to(scratch)): _fingerprint(file) for file in files}
        manifest = json.dumps({**about, "files": sealed}, indent=2)
        (scratch / MANIFEST).write_text(manifest + "\n", encoding="utf-8")
        # The rename may reach the disk before the bytes of what it renames.
        for written in (scratch, *scratch.rglob("*")):
            flush(written)
        shutil.rmtree(path, ignore_errors=True)
        os.replace(scratch, path)
        flush(path.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def read_sealed(path: Path) -> dict[str, Any]:
    """Compare every file of a sealed folder with its manifest; returns the manifest.

    Raises:
        Damaged: a file is missing, short or changed, or there is no manifest.
    """
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in manifest["files"].items():
            found = _fingerprint(path / name)
            if found != expected:
                raise Damaged(
                    f"{path / name}: not as it was written ({found['size']} bytes of "
                    f"{expected['size']}, or another sha256)"
                )
    except OSError as error:
        raise Damaged(f"{error.filename}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError) as error:
        raise Damaged(f"{path / MANIFEST}: not a manifest ({error!r})") from error
    return manifest


def is_whole(path: Path) -> bool:
    """Whether a sealed folder is there, as it was written."""
    try:
        read_sealed(path)
    except Damaged:
        return False
    return True


def _fingerprint(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return {"size": file.stat().st_size, "sha256": digest}


def flush(path: Path) -> None:
    """Have a file's or a folder's contents on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
