"""The pieces of `chunked.py`: chunks of the vocabulary, blocks of tokens, and a block's scores.

Shapes: N tokens, H hidden size, V vocabulary, C words of a chunk, R tokens of a block.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_rl.kernels.arguments import NO_INDEX, Head, compute_dtype
from moe_rl.kernels.product import columns, product, product_plus

CHUNK_NUMBERS = 2**22  # of the weight: 16 MiB in float32
BLOCK_SCORES = 2**21  # 8 MiB in float32, of which the entropy's gradient holds three
MAX_WORDS = 1024  # wider products are no faster


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """C words of the vocabulary, in the dtype of the arithmetic."""

    words: slice
    weights: list[Tensor]
    """`[C, K]` for each range of the hidden size, see `product.columns`."""
    bias: Tensor | None

    @property
    def start(self) -> int:
        """The first word."""
        return int(self.words.start)

    def __len__(self) -> int:
        return len(self.weights[0])


@dataclass(frozen=True, kw_only=True)
class Work:
    """The tokens that count, in the dtype of the arithmetic, and the head over all words."""

    hidden: Tensor
    parts: list[Tensor]
    """`hidden` cut into ranges of the hidden size, as a chunk's weights are."""
    columns: list[slice]
    targets: Tensor
    head: Head
    weight: Tensor
    bias: Tensor | None
    words: int

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        head: Head,
        rows: Tensor | None,
    ) -> "Work":
        """The work of one call; `rows` as `counted` gives them."""
        dtype = compute_dtype(hidden, weight, bias)
        vocab, width = weight.shape
        if isinstance(head.temperature, Tensor):
            head = dataclasses.replace(head, temperature=take(head.temperature, rows))
        ranges = columns(width) if hidden.device.type == "cpu" else [slice(0, width)]
        hidden = take(hidden, rows).to(dtype).contiguous()
        return cls(
            hidden=hidden,
            parts=[hidden[:, part].contiguous() for part in ranges],
            columns=ranges,
            targets=take(targets, rows),
            head=head,
            weight=weight,
            bias=bias,
            words=max(1, min(vocab, MAX_WORDS, CHUNK_NUMBERS // max(width, 1))),
        )

    def chunks(self) -> Iterator[Chunk]:
        """The vocabulary, chunk by chunk; the next overwrites the weights of the one before."""
        dtype = self.hidden.dtype
        # New memory for each chunk would be paged in anew, at a sixth of the product's time.
        room: dict[int, Tensor] = {}
        for start in range(0, len(self.weight), self.words):
            words = slice(start, start + self.words)
            weights = []
            for number, part in enumerate(self.columns):
                weight = self.weight[words, part]
                if weight.dtype != dtype or not weight.is_contiguous():
                    if number not in room:
                        room[number] = torch.empty(weight.shape, dtype=dtype, device=weight.device)
                    weight = room[number][: len(weight)].copy_(weight)
                weights.append(weight)
            bias = None if self.bias is None else self.bias[words].to(dtype)
            yield Chunk(words=words, weights=weights, bias=bias)

    def blocks(self) -> Iterator[slice]:
        """The tokens, block by block."""
        step = max(1, BLOCK_SCORES // self.words)
        for start in range(0, len(self.hidden), step):
            yield slice(start, start + step)

    def scores(self, chunk: Chunk, block: slice) -> Tensor:
        """s `[R, C]`, a new tensor."""
        hidden, *more_hidden = self.parts
        weight, *more_weights = chunk.weights
        scores = product(hidden[block], weight.t())
        for hidden, weight in zip(more_hidden, more_weights, strict=True):
            scores = product_plus(hidden[block], weight.t(), scores)
        if chunk.bias is not None:
            scores += chunk.bias
        if self.head.softcap is not None:
            scores.div_(self.head.softcap).tanh_().mul_(self.head.softcap)
        temperature = self.temperature(block, scores.dtype)
        return scores if temperature is None else scores.div_(temperature)

    def temperature(self, block: slice, dtype: torch.dtype) -> float | Tensor | None:
        """What divides the scores of a block; None for 1."""
        if isinstance(self.head.temperature, Tensor):
            return self.head.temperature[block].to(dtype).unsqueeze(1)
        return None if self.head.temperature == 1.0 else self.head.temperature


def place(values: Tensor, columns: Tensor, ours: Tensor) -> None:
    """values[r, columns[r]] = ours[r] where the column is in this chunk; no look at the data."""
    inside = (columns >= 0) & (columns < values.shape[1])
    at = columns.clamp(0, values.shape[1] - 1).unsqueeze(1)
    there = values.gather(1, at).squeeze(1)
    values.scatter_(1, at, ours.where(inside, there).unsqueeze(1))


def counted(targets: Tensor, head: Head) -> Tensor | None:
    """Indices of the tokens that count; None: all of them."""
    if head.ignore_index == NO_INDEX:
        return None
    ignored = targets == head.ignore_index
    return (~ignored).nonzero().squeeze(1) if bool(ignored.any()) else None


def take(values: Tensor, rows: Tensor | None) -> Tensor:
    """The rows that count."""
    return values if rows is None else values[rows]


def each(values: Any, rows: Tensor | None) -> Any:
    """The rows of three arrays, of which some may be None or empty."""
    return tuple(v if v is None or len(v) == 0 else take(v, rows) for v in values)


def full(values: Tensor | None, rows: Tensor | None, targets: Tensor, dtype: torch.dtype) -> Tensor:
    """One number a token: `values` at the tokens that count and 0 at the others."""
    if values is None:
        return targets.new_empty(0, dtype=dtype)
    if rows is None:
        return values.to(dtype)
    return targets.new_zeros(targets.shape, dtype=dtype).index_copy_(0, rows, values.to(dtype))
