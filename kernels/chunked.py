"""Log-probabilities in chunks of the vocabulary, in plain PyTorch: CPU or CUDA, bounded memory.

The vocabulary is the outer loop, so that each chunk of the weight is read, and upcast, once a pass;
the tokens are the inner one. The logsumexp is online: each chunk's maximum m and sums

    l = sum_v exp(s_v - m),   u = sum_v exp(s_v - m) (s_v - m)

are merged in order, in float64, and entropy = log l - u / l (shifted: the unshifted form cancels).
The target is left out of them and joins at the end, by its exact score.
The backward pass computes the scores anew. Shapes: N tokens, H hidden size, V vocabulary, C words
of a chunk, R tokens of a block.
"""

import torch
from torch import Tensor

from moe_rl.kernels.arguments import ZERO_LOG_P, HeadInputs, dense_like
from moe_rl.kernels.chunks import (
    Chunk,
    ChunkedProduct,
    counted,
    fill_rows,
    place,
    take_rows_of_each,
)
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


def chunked_forward(inputs: HeadInputs, *, entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`(logprobs, entropy, lse)` `[N]`, lse in float64; entropy is empty unless asked for."""
    rows = counted(inputs)
    work = ChunkedProduct(inputs, rows)
    dtype, targets = work.inputs.hidden.dtype, work.inputs.targets
    exact = exact_target_scores(work.inputs)
    sums = _Running(exact, dtype, entropy=entropy)
    for chunk in work.chunks():
        for block in work.blocks():
            sums.add(block, work.scores(chunk, block), targets[block] - chunk.start)
    logprobs, spread, lse = outputs_of(exact, *sums.values)
    return (
        fill_rows(logprobs, rows, inputs.targets, dtype),
        fill_rows(spread, rows, inputs.targets, dtype),
        fill_rows(lse, rows, inputs.targets, torch.float64),
    )


def chunked_backward(
    grads: Gradients,
    outputs: tuple[Tensor, Tensor, Tensor],
    inputs: HeadInputs,
    *,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients to hidden, weight and bias, summed in float32 (or 64), in the inputs' dtypes."""
    rows = counted(inputs)
    work = ChunkedProduct(inputs, rows)
    hidden, bias = work.inputs.hidden, inputs.bias
    slope = slopes(
        take_rows_of_each(grads, rows),
        take_rows_of_each(outputs, rows),
        work.inputs.temperature,
        hidden.dtype,
    )
    to_hidden = torch.zeros_like(hidden) if wanted[0] else None
    to_weight = dense_like(inputs.weight) if wanted[1] else None
    to_bias = torch.empty_like(bias) if wanted[2] and bias is not None else None
    for chunk in work.chunks():
        # Summed over blocks of tokens, then stored in the inputs' dtype.
        weight_sum: Tensor | None = None
        bias_sum = hidden.new_zeros(len(chunk))
        for block in work.blocks():
            to_scores = _slopes_of_scores(work, chunk, block, slope)
            if to_hidden is not None:
                for part, columns in zip(work.columns, chunk.weights, strict=True):
                    to_hidden[block, part] += product(to_scores, columns)
            if to_weight is not None:
                part_sum = product(to_scores.t(), hidden[block])
                weight_sum = part_sum if weight_sum is None else weight_sum.add_(part_sum)
            if to_bias is not None:
                bias_sum += to_scores.sum(0)
        if to_weight is not None:
            # No block: every token is ignored, or there is none.
            to_weight[chunk.words] = 0.0 if weight_sum is None else weight_sum
        if to_bias is not None:
            to_bias[chunk.words] = bias_sum
    if to_hidden is not None:
        to_hidden = to_hidden.to(inputs.hidden.dtype)
        if rows is not None:
            to_hidden = dense_like(inputs.hidden).zero_().index_copy_(0, rows, to_hidden)
    return to_hidden, to_weight, to_bias


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
        place(scores, columns, torch.full_like(top, ZERO_LOG_P))
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


def _slopes_of_scores(work: ChunkedProduct, chunk: Chunk, block: slice, slope: Slopes) -> Tensor:
    """d loss / d (hidden @ weight.T + bias) `[R, C]` for one block of one chunk."""
    scores = work.scores(chunk, block)
    cap_slope = None
    if work.inputs.softcap is not None:
        temperature = work.temperature(block, scores.dtype)
        tanh = scores / work.inputs.softcap
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
    place(scores, work.inputs.targets[block] - chunk.start, slope.target[block])
    return scores if cap_slope is None else scores.mul_(cap_slope)
