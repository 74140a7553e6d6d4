"""Settings of the process that a run relies on: number of threads, reuse of freed memory."""

import contextlib
from collections.abc import Iterator

import torch
from threadpoolctl import threadpool_limits

from moe_rl.cpu import keep_freed_memory


def prepare_process(num_threads: int) -> None:
    """Give torch and numpy `num_threads` threads each, and keep freed memory for reuse."""
    torch.set_num_threads(num_threads)
    # numpy's BLAS has a thread pool of its own, which torch's setting does not reach.
    threadpool_limits(num_threads, user_api="blas")
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
