"""What the command line tells the user: one clear line for each thing that goes wrong."""

import errno
import os
import re
import sys
import warnings
from typing import Any

from moe_rl.runtime.stopping import PeerFailed

FAILED = 1
BAD_INPUT = 2

# What is wrong, and what to do.
_OS_ERRORS = {
    errno.ENOSPC: "the disk is full; what was written stays",
    errno.EDQUOT: "your disk quota is full; what was written stays",
    errno.EFBIG: "larger than files may be here (ulimit -f); what was written stays",
    errno.ENOTDIR: "a part of this path is a file; choose another",
    errno.EEXIST: "a file is in the way; choose another path",
    errno.EISDIR: "a folder, where a file is expected",
    errno.ENOENT: "no such file or folder",
    errno.EACCES: "permission denied; choose a path that you may use",
    errno.EROFS: "a read-only file system; choose another path",
}


def is_main_rank() -> bool:
    """Whether this process talks to the user; among processes of torchrun one does."""
    return os.environ.get("RANK", "0") == "0"


def say(message: str) -> None:
    """Print a result, once for all processes."""
    if is_main_rank():
        print(message)


def complain(message: str) -> None:
    """Print an error or a warning to standard error."""
    rank = "" if is_main_rank() else f" (rank {os.environ['RANK']})"
    print(f"moe-rl{rank}: {message}", file=sys.stderr)


def explain(error: Exception) -> tuple[int, str] | None:
    """The exit code and the line for an error that a user can cause; None: a bug of ours."""
    first_line = (str(error).splitlines() or [""])[0]
    if isinstance(error, FloatingPointError | PeerFailed):
        return FAILED, str(error)
    if isinstance(error, OSError):
        reason = _OS_ERRORS.get(error.errno or 0)
        return BAD_INPUT, f"{error.filename or 'output'}: {reason}" if reason else str(error)
    if isinstance(error, ValueError):
        return BAD_INPUT, str(error)
    # torch raises the same class for everything, so that its text has to tell.
    if not isinstance(error, RuntimeError | MemoryError):
        return None
    if "RANK" in os.environ and re.search(
        r"gloo|NCCL|[Cc]onnection (closed|reset|refused)", str(error)
    ):
        return FAILED, f"another process of this training is gone ({first_line:.120})"
    if isinstance(error, MemoryError) or re.search(
        r"can't allocate|alloc_cpu|out of memory|Storage size calculation", str(error)
    ):
        return BAD_INPUT, f"does not fit into memory ({first_line:.120}); choose smaller sizes"
    return None


_format_any = warnings.formatwarning


def format_warning(message: Any, category: type[Warning], *where: Any, **line: Any) -> str:
    """One line for our own warnings, which are about files and not about a line of source."""
    if category.__module__.startswith("moe_rl."):
        return f"moe-rl: {message}\n"
    return _format_any(message, category, *where, **line)
