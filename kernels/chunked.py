"""Log-probabilities in chunks of the vocabulary, in plain PyTorch: any device, bounded memory.

The vocabulary is the outer loop, so that each chunk of the weight is read, and upcast, once a pass;
the tokens are the inner one. The logsumexp is online: each chunk's maximum m and sums

    l = sum_v exp(s_v - m),   u = sum_v exp(s_v - m) (s_v - m)

are merged in order, in float64, and entropy = log l - u / l (shifted: the unshifted form cancels).
The target is left out of them and joins at the end, by its exact score.
The backward pass computes the scores anew. Shapes: N tokens, H hidden size, V vocabulary, C words
of a chunk, R tokens of a block.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_rl.kernels.arguments import NO_INDEX, ZERO_LOG_P, Head, compute_dtype
from moe_rl.kernels.product import product
from moe_rl.kernels.rows import (
    Gradients,
    Slopes,
    Sums,
    exact_target_scores,
    merged,
    outputs_of,
    slopes,
)

_CHUNK_NUMBERS = 2**22  # of the weight: 16 MiB in float32
_BLOCK_SCORES = 2**21  # 8 MiB in float32, of which the entropy gradient holds three
_MAX_WORDS = 1024  # wider products are no faster


def chunked_forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    head: Head,
    *,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(logprobs, entropy, lse)` `[N]`, lse in float64; entropy is empty unless asked for."""
    rows = _counted(targets, head)
    work = _Work.of(hidden, weight, targets, bias, head, rows)
    exact = exact_target_scores(work.hidden, weight, work.targets, bias, work.head)
    sums = _Running(exact, work.hidden.dtype, entropy=entropy)
    for chunk in work.chunks():
        for block in work.blocks():
            sums.add(block, work.scores(chunk, block), work.targets[block] - chunk.start)
    logprobs, spread, lse = outputs_of(exact, *sums.values)
    dtype = work.hidden.dtype
    return (
        _full(logprobs, rows, targets, dtype),
        _full(spread, rows, targets, dtype),
        _full(lse, rows, targets, torch.float64),
    )


def chunked_backward(
    grads: Gradients,
    outputs: tuple[Tensor, Tensor, Tensor],
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    head: Head,
    *,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients to hidden, weight and bias, summed in float32 (or 64), in the inputs' dtypes."""
    rows = _counted(targets, head)
    work = _Work.of(hidden, weight, targets, bias, head, rows)
    slope = slopes(_each(grads, rows), _each(outputs, rows), work.head, work.hidden.dtype)
    to_hidden = torch.zeros_like(work.hidden) if wanted[0] else None
    to_weight = torch.empty_like(weight) if wanted[1] else None
    to_bias = torch.empty_like(bias) if wanted[2] and bias is not None else None
    for chunk in work.chunks():
        sums_weight: Tensor | None = None
        sums_bias: Tensor | None = None
        for block in work.blocks():
            to_scores = _slopes_of_scores(work, chunk, block, slope)
            if to_hidden is not None:
                to_hidden[block] += product(to_scores, chunk.weight)
            if to_weight is not None:
                part = product(to_scores.t(), work.hidden[block])
                sums_weight = part if sums_weight is None else sums_weight.add_(part)
            if to_bias is not None:
                part = to_scores.sum(0)
                sums_bias = part if sums_bias is None else sums_bias.add_(part)
        if to_weight is not None:
            to_weight[chunk.words] = 0 if sums_weight is None else sums_weight
        if to_bias is not None:
            to_bias[chunk.words] = 0 if sums_bias is None else sums_bias
    if to_hidden is not None and rows is not None:
        to_hidden = torch.zeros_like(hidden).index_copy_(0, rows, to_hidden.to(hidden.dtype))
    return None if to_hidden is None else to_hidden.to(hidden.dtype), to_weight, to_bias


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """C words of the vocabulary, in the dtype of the arithmetic."""

    words: slice
    weight: Tensor
    bias: Tensor | None

    @property
    def start(self) -> int:
        return int(self.words.start)


@dataclass(frozen=True, kw_only=True)
class _Work:
    """The tokens that count, in the dtype of the arithmetic, and the head over all words."""

    hidden: Tensor
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
    ) -> "_Work":
        dtype = compute_dtype(hidden, weight, bias)
        vocab, width = weight.shape
        targets = _take(targets, rows)
        if targets.device.type == "cpu" and len(targets):
            low, high = targets.aminmax()
            if low < 0 or high >= vocab:
                raise IndexError(f"targets must be in [0, {vocab}), got {int(low)} to {int(high)}")
        if isinstance(head.temperature, Tensor):
            head = dataclasses.replace(head, temperature=_take(head.temperature, rows))
        return cls(
            hidden=_take(hidden, rows).to(dtype).contiguous(),
            targets=targets,
            head=head,
            weight=weight,
            bias=bias,
            words=max(1, min(vocab, _MAX_WORDS, _CHUNK_NUMBERS // max(width, 1))),
        )

    def chunks(self) -> Iterator[_Chunk]:
        """The vocabulary, chunk by chunk."""
        dtype = self.hidden.dtype
        for start in range(0, len(self.weight), self.words):
            words = slice(start, start + self.words)
            yield _Chunk(
                words=words,
                weight=self.weight[words].to(dtype).contiguous(),
                bias=None if self.bias is None else self.bias[words].to(dtype),
            )

    def blocks(self) -> Iterator[slice]:
        """The tokens, block by block."""
        step = max(1, _BLOCK_SCORES // self.words)
        for start in range(0, len(self.hidden), step):
            yield slice(start, start + step)

    def scores(self, chunk: _Chunk, block: slice) -> Tensor:
        """s `[R, C]`, a new tensor."""
        scores = product(self.hidden[block], chunk.weight.t())
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


class _Running:
    """Running m, l and u over the words that are not the target, float64 `[N]` each."""

    def __init__(self, exact: Tensor, dtype: torch.dtype, *, entropy: bool) -> None:
        self.floor = torch.finfo(dtype).min
        # Not 0: the exponentials of a row of very negative scores would all vanish. Not -inf:
        # a chunk of removed words would give -inf - -inf, a NaN.
        peak = torch.full_like(exact, self.floor)
        moment = torch.zeros_like(exact) if entropy else None
        self.values: Sums = (peak, torch.zeros_like(exact), moment)

    def add(self, block: slice, scores: Tensor, columns: Tensor) -> None:
        """Merge the scores `[R, C]` of the next words, which are overwritten."""
        peak, total, moment = self.values
        top = scores.amax(1).clamp_min_(self.floor)
        scores.sub_(top.unsqueeze(1))
        _place(scores, columns, torch.full_like(top, ZERO_LOG_P))
        new_moment = None
        if moment is None:
            new_total = scores.exp_().sum(1)
        else:
            # A removed word's exp(-inf) * -inf would be NaN.
            weights = scores.clamp_min_(ZERO_LOG_P).exp()
            new_total, new_moment = weights.sum(1).double(), weights.mul_(scores).sum(1).double()
        old = (peak[block], total[block], None if moment is None else moment[block])
        for whole, part in zip(
            self.values, merged(old, (top.double(), new_total.double(), new_moment)), strict=True
        ):
            if whole is not None and part is not None:
                whole[block] = part


def _slopes_of_scores(work: _Work, chunk: _Chunk, block: slice, slope: Slopes) -> Tensor:
    """d loss / d (hidden @ weight.T + bias) `[R, C]` for one block of one chunk."""
    scores = work.scores(chunk, block)
    cap_slope = None
    if work.head.softcap is not None:
        temperature = work.temperature(block, scores.dtype)
        tanh = scores / work.head.softcap
        cap_slope = (tanh if temperature is None else tanh.mul_(temperature)).square_().neg_()
        cap_slope += 1
    scores.sub_(slope.lse[block].unsqueeze(1))
    base = slope.base[block].unsqueeze(1)
    if slope.spread is None:
        scores.exp_().mul_(base)
    else:
        if chunk.bias is not None:  # a removed word's 0 * -inf would be NaN
            scores.clamp_min_(ZERO_LOG_P)
        pull = scores * -slope.spread[block].unsqueeze(1)
        scores.exp_().mul_(pull.add_(base))
    _place(scores, work.targets[block] - chunk.start, slope.target[block])
    return scores if cap_slope is None else scores.mul_(cap_slope)


def _place(values: Tensor, columns: Tensor, ours: Tensor) -> None:
    """values[r, columns[r]] = ours[r] where the column is in this chunk; no look at the data."""
    inside = (columns >= 0) & (columns < values.shape[1])
    at = columns.clamp(0, values.shape[1] - 1).unsqueeze(1)
    there = values.gather(1, at).squeeze(1)
    values.scatter_(1, at, ours.where(inside, there).unsqueeze(1))


def _counted(targets: Tensor, head: Head) -> Tensor | None:
    """Indices of the tokens that count; None: all of them."""
    if head.ignore_index == NO_INDEX:
        return None
    ignored = targets == head.ignore_index
    return (~ignored).nonzero().squeeze(1) if bool(ignored.any()) else None


def _take(values: Tensor, rows: Tensor | None) -> Tensor:
    return values if rows is None else values[rows]


def _each(values: Any, rows: Tensor | None) -> Any:
    """The rows of three arrays, of which some may be None or empty."""
    return tuple(v if v is None or len(v) == 0 else _take(v, rows) for v in values)


def _full(
    values: Tensor | None, rows: Tensor | None, targets: Tensor, dtype: torch.dtype
) -> Tensor:
    """One number a token: `values` at the tokens that count and 0 at the others."""
    if values is None:
        return targets.new_empty(0, dtype=dtype)
    if rows is None:
        return values.to(dtype)
    return targets.new_zeros(targets.shape, dtype=dtype).index_copy_(0, rows, values.to(dtype))
