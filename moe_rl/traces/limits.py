"""What a trace may grow to in memory: a few bytes of a file can declare more than there is."""

import stat
from pathlib import Path

EXPANSION = 100
"""Times the size of what a trace was read from. Deflate reaches 1000, on nothing but zeros."""
ALWAYS = 2**25
"""Bytes that are allowed whatever the file's size."""


def check_size(needed: int, given: int, what: str) -> None:
    """Refuse to allocate much more than was read.

    Args:
        needed: bytes to be allocated.
        given: bytes that were read.
        what: what would be allocated, for the message.

    Raises:
        ValueError: more than `EXPANSION` times `given`, and more than `ALWAYS`.
    """
    if needed > max(ALWAYS, EXPANSION * given):
        raise ValueError(
            f"{what} would take {needed} bytes, of {given} in the file: no recorded trace is like "
            "that."
        )


def check_is_file(path: Path) -> None:
    """Refuse what may have no end: devices, pipes.

    Raises:
        ValueError: there, but no file.
        OSError: not there.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("not a file.")
