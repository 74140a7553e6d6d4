"""The tile that both Triton kernels compute: scores of a few tokens against a few words.

Shapes of a tile: R tokens, C words, K of the hidden size H a step. Sums are in float32; products of
bfloat16 numbers are exact in it. Nothing is tuned at run time: one configuration for each width of
the inputs, so that equal inputs give equal bits, and so that the interpreter runs what a GPU runs.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_rl.kernels.arguments import HeadInputs
from moe_rl.kernels.choose import interpreting


class Tiles(NamedTuple):
    """Sizes of a tile and how a GPU runs it."""

    tokens: int
    words: int
    width: int
    num_warps: int
    num_stages: int


HALF = Tiles(tokens=128, words=256, width=64, num_warps=8, num_stages=3)
"""16-bit inputs: 144 KiB of shared memory, within an H100's 228."""
FULL = Tiles(tokens=64, words=128, width=32, num_warps=4, num_stages=3)
"""float32 inputs, or inputs of different types, which are upcast."""


def tiles(hidden: Tensor, weight: Tensor) -> Tiles:
    """The configuration for these inputs."""
    halves = hidden.dtype == weight.dtype and hidden.dtype.itemsize == 2
    return HALF if halves else FULL


def upcast(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the kernel turns its inputs to float32 before it multiplies them.

    The interpreter's bfloat16 products are wrong without a word, so there it always does.
    """
    return interpreting() or hidden.dtype != weight.dtype


def temperatures(inputs: HeadInputs) -> Tensor | None:
    """float32 `[N]`, or None where every temperature is 1."""
    temperature, targets = inputs.temperature, inputs.targets
    if isinstance(temperature, Tensor):
        return temperature.float()
    if temperature == 1.0:
        return None
    return torch.full(targets.shape, temperature, dtype=torch.float32, device=targets.device)


@triton.jit
def tanh(x):  # type: ignore[no-untyped-def]
    """tanh in float32, relative error below 2e-7; from exp, which every backend of Triton has.

    Near 0, where 1 - exp cancels, the polynomial of the Cephes library's tanhf.
    """
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    far = tl.where(x < 0, -far, far)
    z = x * x
    near = ((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z
    near = ((near + 1.33314422036e-1) * z - 3.33332819422e-1) * z * x + x
    return tl.where(tl.abs(x) < 0.625, near, far)


@triton.jit
def score_tile(  # type: ignore[no-untyped-def]
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
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    UPCAST: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Scores s `[R, C]` and the slope ds/dz of cap and temperature, `[R, C]`.

    Words past the vocabulary have -inf: as zeros they would be phantom words with logit 0.
    """
    # Offsets in 64 bits: V * H passes 2^31 for a vocabulary of 262144 at a width of 8192.
    row_start = hidden + tl.minimum(rows, num_tokens - 1).to(tl.int64)[:, None] * hidden_stride
    col_start = weight + tl.minimum(cols, vocab - 1).to(tl.int64)[None, :] * weight_stride
    z = tl.zeros((rows.shape[0], cols.shape[0]), dtype=tl.float32)
    for start in range(0, width, WIDTH):
        k = start + tl.arange(0, WIDTH)
        x = tl.load(row_start + k[None, :], mask=k[None, :] < width, other=0.0)
        w = tl.load(col_start + k[:, None], mask=k[:, None] < width, other=0.0)
        if UPCAST:
            x, w = x.to(tl.float32), w.to(tl.float32)
        # ieee: TF32 would keep 10 bits of a float32.
        z = tl.dot(x, w, acc=z, input_precision="ieee")
    if HAS_BIAS:
        z += tl.load(bias + cols, mask=cols < vocab, other=0.0).to(tl.float32)[None, :]
    slope = tl.full(z.shape, 1.0, dtype=tl.float32)
    if HAS_CAP:
        bent = tanh(z / softcap)
        z = bent * softcap
        slope = 1.0 - bent * bent
    if HAS_TEMPERATURE:
        t = tl.load(temperature + rows, mask=rows < num_tokens, other=1.0)
        z = z / t[:, None]
    return tl.where(cols[None, :] < vocab, z, float("-inf")), slope
