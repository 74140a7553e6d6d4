"""Keep the C allocator from handing large freed blocks back to the system.

A decoding step allocates and frees tensors of megabytes. By default glibc serves such requests
with fresh pages and returns them at once, so that each step pays for page faults again: a third of
the time of stock decoding at the sizes this package trains on a CPU.
"""

import ctypes
import sys

# Parameters of glibc's mallopt, from malloc.h, and values in bytes.
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_THRESHOLD = -3
_ONE_GIB = 1 << 30
_SIXTY_FOUR_MIB = 64 << 20


def keep_freed_memory() -> bool:
    """Let this process reuse the memory it frees, up to blocks of 1 GiB, until it ends.

    Returns:
        Whether the C library took the settings; False where it is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = (
        (_M_MMAP_THRESHOLD, _ONE_GIB),
        (_M_TRIM_THRESHOLD, _ONE_GIB),
        (_M_TOP_PAD, _SIXTY_FOUR_MIB),
    )
    taken = [mallopt(name, value) == 1 for name, value in settings]
    return all(taken)
