"""The pieces of `chunked.py`: chunks of the vocabulary, blocks of tokens, and a block's scores.

Shapes: N tokens, H hidden size, V vocabulary, C words of a chunk, R tokens of a block.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_rl.kernels.arguments import NO_INDEX, HeadInputs
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


class ChunkedProduct:
    """The scores of the tokens that count, in the dtype of the arithmetic, chunk by chunk.

    Args:
        inputs: one call's.
        rows: indices of the tokens that count, see `counted`.
    """

    def __init__(self, inputs: HeadInputs, rows: Tensor | None) -> None:
        vocab, width = inputs.weight.shape
        temperature = inputs.temperature
        on_cpu = inputs.hidden.device.type == "cpu"
        self.columns = columns(width) if on_cpu else [slice(0, width)]
        """Ranges of the hidden size, whose products are added up."""
        self.inputs = inputs._replace(
            hidden=take_rows(inputs.hidden, rows).to(inputs.dtype).contiguous(),
            targets=take_rows(inputs.targets, rows),
            temperature=(
                take_rows(temperature, rows) if isinstance(temperature, Tensor) else temperature
            ),
        )
        self.parts = [self.inputs.hidden[:, part].contiguous() for part in self.columns]
        """`hidden` cut into these ranges, as a chunk's weights are."""
        self.words = max(1, min(vocab, MAX_WORDS, CHUNK_NUMBERS // max(width, 1)))
        """C."""

    def chunks(self) -> Iterator[Chunk]:
        """The vocabulary, chunk by chunk; the next overwrites the weights of the one before."""
        dtype, whole, biases = self.inputs.hidden.dtype, self.inputs.weight, self.inputs.bias
        # New memory for each chunk would be paged in anew, at a sixth of the product's time.
        room: dict[int, Tensor] = {}
        for start in range(0, len(whole), self.words):
            words = slice(start, start + self.words)
            weights = []
            for number, part in enumerate(self.columns):
                weight = whole[words, part]
                if weight.dtype != dtype or not weight.is_contiguous():
                    if number not in room:
                        room[number] = torch.empty(weight.shape, dtype=dtype, device=weight.device)
                    weight = room[number][: len(weight)].copy_(weight)
                weights.append(weight)
            bias = None if biases is None else biases[words].to(dtype)
            yield Chunk(words=words, weights=weights, bias=bias)

    def blocks(self) -> Iterator[slice]:
        """The tokens, block by block."""
        step = max(1, BLOCK_SCORES // self.words)
        for start in range(0, len(self.inputs.hidden), step):
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
        softcap = self.inputs.softcap
        if softcap is not None:
            scores.div_(softcap).tanh_().mul_(softcap)
        temperature = self.temperature(block, scores.dtype)
        return scores if temperature is None else scores.div_(temperature)

    def temperature(self, block: slice, dtype: torch.dtype) -> float | Tensor | None:
        """What divides the scores of a block; None for 1."""
        temperature = self.inputs.temperature
        if isinstance(temperature, Tensor):
            return temperature[block].to(dtype).unsqueeze(1)
        return None if temperature == 1.0 else temperature


def place(values: Tensor, columns: Tensor, ours: Tensor) -> None:
    """values[r, columns[r]] = ours[r] where the column is in this chunk; no look at the data."""
    inside = (columns >= 0) & (columns < values.shape[1])
    at = columns.clamp(0, values.shape[1] - 1).unsqueeze(1)
    there = values.gather(1, at).squeeze(1)
    values.scatter_(1, at, ours.where(inside, there).unsqueeze(1))


def counted(inputs: HeadInputs) -> Tensor | None:
    """Indices of the tokens that count; None: all of them."""
    if inputs.ignore_index == NO_INDEX:
        return None
    ignored = inputs.targets == inputs.ignore_index
    return (~ignored).nonzero().squeeze(1) if bool(ignored.any()) else None


def take_rows(values: Tensor, rows: Tensor | None) -> Tensor:
    """The rows that count."""
    return values if rows is None else values[rows]


def take_rows_of_each(values: Any, rows: Tensor | None) -> Any:
    """The rows of three arrays, of which some may be None or empty."""
    return tuple(v if v is None or len(v) == 0 else take_rows(v, rows) for v in values)


def fill_rows(
    values: Tensor | None, rows: Tensor | None, targets: Tensor, dtype: torch.dtype
) -> Tensor:
    """One number a token: `values` at the tokens that count and 0 at the others."""
    if values is None:
        return targets.new_empty(0, dtype=dtype)
    if rows is None:
        return values.to(dtype)
    return targets.new_zeros(targets.shape, dtype=dtype).index_copy_(0, rows, values.to(dtype))
