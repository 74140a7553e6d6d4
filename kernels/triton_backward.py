"""Gradients of the log-probabilities: score slopes by a Triton kernel, products by the library.

A strip of the vocabulary at a time: the kernel computes the scores anew and writes
d loss / d (hidden @ weight.T + bias), `[N, STRIP_WORDS]`; two matrix products take it to hidden and
weight. The gradient to hidden sums over strips in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_rl.kernels.arguments import HeadInputs, dense_like
from moe_rl.kernels.choose import interpreting
from moe_rl.kernels.product import product
from moe_rl.kernels.rows import Gradients, Slopes, slopes
from moe_rl.kernels.triton_logprobs import without_ignored
from moe_rl.kernels.triton_tile import score_tile, temperatures, tiles, upcast

STRIP_WORDS = 8192
"""At N = 8192 in bfloat16 a strip takes 128 MiB, and its products fill an H100."""


def triton_backward(
    grads: Gradients,
    outputs: tuple[Tensor, Tensor, Tensor],
    inputs: HeadInputs,
    *,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients to hidden, weight and bias in the inputs' dtypes."""
    inputs, keep = without_ignored(inputs)
    hidden, weight, bias = inputs.hidden, inputs.weight, inputs.bias
    slope = slopes(grads, outputs, inputs.temperature, torch.float32)
    if keep is not None:
        slope = slope.where(keep)
    to_hidden = torch.zeros_like(hidden, dtype=torch.float32) if wanted[0] else None
    to_weight = dense_like(weight) if wanted[1] else None
    to_bias = torch.empty_like(bias) if wanted[2] and bias is not None else None
    rows = weight if weight.stride(1) == 1 else weight.contiguous()
    for start in range(0, len(weight), STRIP_WORDS):
        words = slice(start, min(start + STRIP_WORDS, len(weight)))
        strip = _strip(inputs._replace(weight=rows), slope, words)
        if to_hidden is not None:
            to_hidden += _product(strip, rows[words])
        if to_weight is not None:
            to_weight[words] = _product(strip.t(), hidden)
        if to_bias is not None:
            to_bias[words] = strip.sum(0, dtype=torch.float32)
    return None if to_hidden is None else to_hidden.to(hidden.dtype), to_weight, to_bias


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32. A bfloat16 result would round each strip's sum."""
    if a.dtype == b.dtype and a.dtype.itemsize == 2 and a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return product(a.float(), b.float())


def _strip(inputs: HeadInputs, slope: Slopes, words: slice) -> Tensor:
    """d loss / d (hidden @ weight.T + bias) for the words of a strip."""
    hidden, weight, targets, bias = inputs.hidden, inputs.weight, inputs.targets, inputs.bias
    softcap = inputs.softcap
    num_tokens, (vocab, width) = len(targets), weight.shape
    # In the inputs' type, for tensor cores; the interpreter would truncate, not round, to bfloat16.
    halves = hidden.dtype == weight.dtype and not interpreting()
    strip = hidden.new_empty(
        num_tokens, words.stop - words.start, dtype=hidden.dtype if halves else torch.float32
    )
    config = tiles(hidden, weight)
    temperature = temperatures(inputs)
    grid = (triton.cdiv(num_tokens, config.tokens) * triton.cdiv(strip.shape[1], config.words),)
    if num_tokens:
        _strip_kernel[grid](
            *(hidden, weight, bias, temperature, targets, slope.lse),
            *(slope.base, slope.spread, slope.target, strip),
            *(num_tokens, vocab, width, hidden.stride(0), weight.stride(0), softcap or 0.0),
            *(words.start, words.stop),
            *(bias is not None, softcap is not None, temperature is not None),
            *(slope.spread is not None, upcast(hidden, weight)),
            *config[:3],
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return strip


@triton.jit
def _strip_kernel(  # type: ignore[no-untyped-def]
    hidden,
    weight,
    bias,
    temperature,
    targets,
    lse,
    base,
    spread,
    at_target,
    strip,
    num_tokens,
    vocab,
    width,
    hidden_stride,
    weight_stride,
    softcap,
    start,
    stop,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    ENTROPY: tl.constexpr,
    UPCAST: tl.constexpr,
    TOKENS: tl.constexpr,
    WORDS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    blocks = tl.cdiv(num_tokens, TOKENS)
    rows = (tl.program_id(0) % blocks) * TOKENS + tl.arange(0, TOKENS)
    cols = start + (tl.program_id(0) // blocks) * WORDS + tl.arange(0, WORDS)
    inside = rows < num_tokens
    s, cap_slope = score_tile(
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
    log_p = s - tl.load(lse + rows, mask=inside, other=float("inf"))[:, None]
    factor = tl.load(base + rows, mask=inside, other=0.0)[:, None]
    if ENTROPY:
        # A removed word's 0 * -inf would be NaN. `ZERO_LOG_P` of arguments.py.
        pull = tl.load(spread + rows, mask=inside, other=0.0)[:, None]
        factor = factor - pull * tl.maximum(log_p, -1e4)
    grad = tl.exp(log_p) * factor
    target = tl.load(targets + rows, mask=inside, other=-1)
    exact = tl.load(at_target + rows, mask=inside, other=0.0)
    grad = tl.where(cols[None, :] == target[:, None], exact[:, None], grad) * cap_slope
    at = rows.to(tl.int64)[:, None] * (stop - start) + (cols - start)[None, :]
    stored = inside[:, None] & (cols < stop)[None, :]
    tl.store(strip + at, grad.to(strip.dtype.element_ty), mask=stored)
