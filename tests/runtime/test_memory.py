"""Reuse of freed memory."""

import subprocess
import sys

# In a process of its own: other tests leave the heap in pieces. Where the C library puts blocks one
# behind the other, the first of them go through all of the 64 MiB that it has taken in advance.
_FAULTS = """
import resource

import torch

from moe_rl.runtime.process import keep_freed_memory

taken = keep_freed_memory()
for _ in range(20):
    torch.empty(16 << 20).fill_(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.empty(16 << 20).fill_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before if taken else 0)
"""


def test_memory_freed_once_is_had_again_without_page_faults() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _FAULTS], capture_output=True, text=True, check=True, timeout=120
    )
    # 64 MiB are 16384 pages of 4 KiB, more than glibc keeps by itself: 327680 faults.
    assert int(done.stdout) < 3 * 2048
