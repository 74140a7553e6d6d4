"""Reuse of freed memory."""

import resource

import torch

from moe_rl.runtime.process import keep_freed_memory


def test_memory_freed_once_is_had_again_without_page_faults() -> None:
    taken = keep_freed_memory()
    torch.empty(2 << 20).fill_(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.empty(2 << 20).fill_(1)
    # 8 MiB are 2048 pages of 4 KiB; taken anew each time they would be 40960 faults. Where other
    # tests have left the heap in pieces, a few are.
    assert not taken or resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 10 * 2048
