"""Processes that train together: which one this is, and the few things they tell each other.

torchrun starts them and says so in the environment. A process that trains alone is one rank, and
every exchange returns its own values. Tensors are sent as bytes: exact in any dtype, not pickled.
"""

import contextlib
import datetime
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from moe_rl.runtime.stopping import PeerFailed

# A rank may wait while another trains a cold start.
_PATIENCE = datetime.timedelta(hours=6)
_SETTLING = 0.5  # seconds; a thread's wait for the GIL takes milliseconds


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those that train together; alone by default."""

    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this one writes the run folder and talks to the user."""
        return self.rank == 0

    def gather(self, tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rows of all ranks, one rank's after the other's; a rank may have any number of them.

        The tables, [n, ...] each, have equal names, dtypes and trailing shapes on all ranks. They
        are sent together, as the time of a small exchange hardly depends on its size.
        """
        if self.size == 1:
            return dict(tables)
        own = [table.detach().contiguous().flatten().view(torch.uint8) for table in tables.values()]
        sizes = torch.tensor([len(part) for part in own], device=own[0].device)
        lengths = [found.tolist() for found in self._exchange(sizes)]
        data = own[0].new_zeros(max(map(sum, lengths)))
        data[: sum(map(len, own))] = torch.cat(own)
        parts = [
            found[: sum(length)].split(length)
            for found, length in zip(self._exchange(data), lengths, strict=True)
        ]
        return {
            # Joined before `view(dtype)`: a part's offset need not be a multiple of its item size.
            name: torch.cat(of_ranks).view(table.dtype).view(-1, *table.shape[1:])
            for (name, table), of_ranks in zip(
                tables.items(), zip(*parts, strict=True), strict=True
            )
        }

    def largest(self, value: int) -> int:
        """The largest of the ranks' values."""
        return max(self._numbers(value, torch.int64)) if self.size > 1 else value

    def total(self, value: float) -> float:
        """The sum of the ranks' values, equal on all of them."""
        return sum(self._numbers(value, torch.float64)) if self.size > 1 else value

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Make a block fail on all ranks if it fails on one, so that none waits for a dead one.

        Raises:
            PeerFailed: where the block itself did not fail.
        """
        failure = None
        try:
            yield
        except (ValueError, OSError, FloatingPointError) as error:
            failure = error
        if self.largest(int(failure is not None)):
            raise failure or PeerFailed("another process has failed; its own message says why")

    @contextlib.contextmanager
    def finite_together(self) -> Iterator[None]:
        """The same, but NaN or inf on one rank is known to all, and each can still act on it.

        Raises:
            FloatingPointError: the block raised one, on any rank.
        """
        failure = ""
        with self.together():
            try:
                yield
            except FloatingPointError as error:
                failure = str(error)
        if self.largest(len(failure)):
            raise FloatingPointError(failure or "another rank's policy gives NaN or inf")

    def _numbers(self, value: float, dtype: torch.dtype) -> list[Any]:
        """One number of each rank."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        own = torch.tensor([value], dtype=dtype, device=device)
        return torch.cat(self._exchange(own)).tolist()

    def _exchange(self, own: Tensor) -> list[Tensor]:
        """The tensor of each rank; all have one shape."""
        found = [torch.empty_like(own) for _ in range(self.size)]
        distributed.all_gather(found, own)
        return found


@contextlib.contextmanager
def join() -> Iterator[Ranks]:
    """The ranks that torchrun started, for the length of a block; one rank where it did not.

    Each takes the GPU of its local rank, where there is one. An existing process group is used and
    not destroyed.
    """
    if distributed.is_initialized():
        yield Ranks(rank=distributed.get_rank(), size=distributed.get_world_size())
        return
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    distributed.init_process_group(backend, timeout=_PATIENCE)
    try:
        yield Ranks(rank=distributed.get_rank(), size=distributed.get_world_size())
    finally:
        # gloo's thread takes the GIL to free the tensors of the last exchange, while whoever
        # destroys the group holds the GIL and waits for that thread: let it finish first.
        time.sleep(_SETTLING)
        distributed.destroy_process_group()
