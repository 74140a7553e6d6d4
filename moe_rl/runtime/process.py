"""The process that a run relies on: number of threads, reuse of freed memory, processor."""

import contextlib
import ctypes
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

# Parameters of glibc's mallopt, from malloc.h, and their values in bytes.
_MMAP_THRESHOLD, _TRIM_THRESHOLD, _TOP_PAD = -3, -1, -2
_MALLOPT = ((_MMAP_THRESHOLD, 1 << 30), (_TRIM_THRESHOLD, 1 << 30), (_TOP_PAD, 64 << 20))


def prepare_process(num_threads: int) -> None:
    """Give torch `num_threads` threads, and keep freed memory for reuse."""
    torch.set_num_threads(num_threads)
    keep_freed_memory()


@contextlib.contextmanager
def process_of(num_threads: int) -> Iterator[None]:
    """`prepare_process` for the length of a block; torch gets its threads back afterwards."""
    before = torch.get_num_threads()
    prepare_process(num_threads)
    try:
        yield
    finally:
        prepare_process(before)


def keep_freed_memory() -> bool:
    """Let this process reuse the memory it frees, up to blocks of 1 GiB, until it ends.

    A decoding step allocates and frees tensors of megabytes. By default glibc serves these with
    fresh pages and returns them at once, so that each step pays for page faults again: a third of
    the time of stock decoding at the sizes this package trains on a CPU.

    Returns:
        Whether the C library took the settings; False where it is not glibc.
    """
    glibc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    mallopt = getattr(glibc, "mallopt", None)
    if mallopt is None:
        return False
    taken = [mallopt(name, value) == 1 for name, value in _MALLOPT]
    return all(taken)


_BUILD = {"cpu family": "family", "model": "model", "stepping": "stepping"}


def cpu_name() -> str:
    """The processor's name and build, as far as the system tells."""
    with contextlib.suppress(OSError, KeyError):
        first, _, _ = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")
        lines = [line.partition(":") for line in first.splitlines()]
        facts = {name.strip(): value.strip() for name, _, value in lines}
        # A virtual machine may hide the model in the name, and not in these.
        build = [f"{word} {facts[key]}" for key, word in _BUILD.items() if key in facts]
        return facts["model name"] + (f" ({', '.join(build)})" if build else "")
    return platform.processor() or "cpu"
