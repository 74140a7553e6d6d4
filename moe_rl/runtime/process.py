"""Settings of a whole process that a run relies on: threads, and reuse of freed memory."""

import contextlib
from collections.abc import Iterator

import torch
from threadpoolctl import threadpool_limits

from moe_rl.cpu import keep_freed_memory


def prepare_process(num_threads: int) -> None:
    """Give torch and numpy `num_threads` threads each, and let freed memory be used again."""
    torch.set_num_threads(num_threads)
    # numpy's matrix products have threads of their own, which torch's setting does not reach.
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
