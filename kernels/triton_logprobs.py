"""Log-probabilities in one Triton kernel: scores live in registers only.

A program takes a tile of tokens and one of the vocabulary's parts, and keeps the online sums of
`chunked.py` (m, l, u) over the part's words. The parts are cut by V alone and merged in order,
without atomics, so a token's result depends neither on the other tokens nor on the run.
Shapes: N tokens, H hidden size, V vocabulary, P parts.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_rl.kernels.arguments import NO_INDEX, HeadInputs
from moe_rl.kernels.rows import Sums, exact_target_scores, merged, outputs_of
from moe_rl.kernels.triton_tile import score_tile, temperatures, tiles, upcast

PART_WORDS = 2048
"""Words of a part: with V = 151936 and one tile of tokens, 75 programs for a GPU of 132 cores."""


def triton_forward(inputs: HeadInputs, *, entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`(logprobs, entropy, lse)` `[N]`, lse in float64; entropy is empty unless asked for."""
    inputs, keep = without_ignored(inputs)
    exact = exact_target_scores(inputs)
    sums = _merged_sums(inputs, entropy=entropy)
    logprobs, spread, lse = outputs_of(exact, *sums)
    shown = logprobs.float(), logprobs[:0].float() if spread is None else spread.float(), lse
    if keep is None:
        return shown
    logprobs, spread, lse = (out.where(keep[: len(out)], 0) for out in shown)
    return logprobs, spread, lse


def without_ignored(inputs: HeadInputs) -> tuple[HeadInputs, Tensor | None]:
    """Ignored tokens as zeros with target 0, and bool `[N]`: which tokens count; None: all.

    Their own numbers may be NaN, and 0 * NaN would reach the weight's gradient.
    """
    hidden, targets = inputs.hidden, inputs.targets
    if inputs.ignore_index == NO_INDEX:
        return inputs._replace(hidden=hidden.contiguous()), None
    keep = targets != inputs.ignore_index
    hidden = hidden.where(keep.unsqueeze(1), 0).contiguous()
    return inputs._replace(hidden=hidden, targets=targets.where(keep, 0)), keep


def _merged_sums(inputs: HeadInputs, *, entropy: bool) -> Sums:
    """m, l and u over the words that are not the target, merged first part to last."""
    hidden, targets, bias, softcap = inputs.hidden, inputs.targets, inputs.bias, inputs.softcap
    weight = inputs.weight if inputs.weight.stride(1) == 1 else inputs.weight.contiguous()
    num_tokens, (vocab, width) = len(targets), weight.shape
    config = tiles(hidden, weight)
    parts = triton.cdiv(vocab, PART_WORDS)
    partial = torch.empty(3, parts, num_tokens, dtype=torch.float32, device=hidden.device)
    temperature = temperatures(inputs)
    # One axis: the others end at 65535 programs.
    grid = (triton.cdiv(num_tokens, config.tokens) * parts,)
    if num_tokens:
        _forward_kernel[grid](
            *(hidden, weight, bias, temperature, targets, partial),
            *(num_tokens, vocab, width, hidden.stride(0), weight.stride(0), softcap or 0.0),
            *(bias is not None, softcap is not None, temperature is not None),
            *(entropy, upcast(hidden, weight), PART_WORDS),
            *config[:3],
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    peaks, totals, moments = partial.double()
    by_part: list[Sums] = [
        (peaks[part], totals[part], moments[part] if entropy else None) for part in range(parts)
    ]
    return functools.reduce(merged, by_part)


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    hidden,
    weight,
    bias,
    temperature,
    targets,
    sums,
    num_tokens,
    vocab,
    width,
    hidden_stride,
    weight_stride,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    ENTROPY: tl.constexpr,
    UPCAST: tl.constexpr,
    PART: tl.constexpr,
    TOKENS: tl.constexpr,
    WORDS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    # Neighbouring programs share a part of the weight, which then stays in the cache.
    blocks = tl.cdiv(num_tokens, TOKENS)
    part = tl.program_id(0) // blocks
    rows = (tl.program_id(0) % blocks) * TOKENS + tl.arange(0, TOKENS)
    inside = rows < num_tokens
    target = tl.load(targets + rows, mask=inside, other=-1)
    # The lowest finite number. From 0, rows of very negative scores would lose every word;
    # from -inf, a tile of removed words would give -inf - -inf.
    floor: tl.constexpr = -3.4028234663852886e38
    peak = tl.full((TOKENS,), floor, dtype=tl.float32)
    total = tl.zeros((TOKENS,), dtype=tl.float32)
    moment = tl.zeros((TOKENS,), dtype=tl.float32)
    for start in range(part * PART, tl.minimum((part + 1) * PART, vocab), WORDS):
        cols = start + tl.arange(0, WORDS)
        s, _ = score_tile(
            hidden,
            weight,
            bias,
            temperature,
            rows,
            cols,
            num_tokens,
            vocab,
            width,
            hidden_stride,
            weight_stride,
            softcap,
            HAS_BIAS,
            HAS_CAP,
            HAS_TEMPERATURE,
            UPCAST,
            WIDTH,
        )
        top = tl.maximum(peak, tl.max(s, axis=1))
        # A NaN must stay one, and Triton's maximum drops it unless told.
        shifted = tl.maximum(s - top[:, None], floor, propagate_nan=tl.PropagateNan.ALL)
        # The target joins later, by its exact score.
        weights = tl.where(cols[None, :] == target[:, None], 0.0, tl.exp(shifted))
        was = peak - top
        scale = tl.exp(was)
        if ENTROPY:
            # A removed word's 0 * -inf is -0 here: `shifted` ends at the floor.
            moment = scale * (moment + total * was) + tl.sum(weights * shifted, axis=1)
        total = scale * total + tl.sum(weights, axis=1)
        peak = top
    at = part * num_tokens + rows.to(tl.int64)
    plane = tl.cdiv(vocab, PART) * num_tokens
    tl.store(sums + at, peak, mask=inside)
    tl.store(sums + plane + at, total, mask=inside)
    tl.store(sums + 2 * plane + at, moment, mask=inside)
