"""Settings of the process that a run relies on: number of threads, reuse of freed memory."""

import contextlib
from collections.abc import Iterator

import torch

from moe_rl.runtime.memory import keep_freed_memory


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
