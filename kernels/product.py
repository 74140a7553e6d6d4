"""Matrix products in full float32, by the fastest library this machine has for them.

PyTorch sends a float32 product on a CPU to MKL, which runs AVX2 code on processors of other makers
than Intel even where they have AVX-512. oneDNN, which every x86 build of PyTorch carries for its
compiler, does not look at the maker: one thread of an AMD EPYC with AVX-512 reaches 250 GFLOP/s
against MKL's 110, on the same float32 numbers. On Intel's own MKL is as fast, and more exact.
"""

import functools
import platform
from pathlib import Path

import torch
from torch import Tensor

MOST_TERMS = 1024


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for `[M, K]` and `[K, N]` of one dtype, float32 or float64, accumulated in it.

    Either may be the transpose of a contiguous matrix. The sums differ from `torch.mm` in order.
    """
    if _onednn_takes(a) and _onednn_takes(b):
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return torch.mm(a, b)


def product_plus(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a @ b + c for c `[M, N]`, a new tensor; otherwise as `product`."""
    if _onednn_takes(a) and _onednn_takes(b) and c.is_contiguous():
        return torch.ops.mkldnn._linear_pointwise.binary(a, c, b.t(), None, "add")
    return torch.addmm(c, a, b)


def columns(width: int) -> list[slice]:
    """Ranges of a width H in which the terms of one sum are to be added, few enough each.

    oneDNN adds a sum's terms in a row, and rounding errors of a large score grow with its partial
    sums: at 2048 terms an entropy is three times as far from float64 as by `torch.mm`, which adds
    them up in ranges of its own.
    """
    step = MOST_TERMS if _onednn_takes(torch.empty(1, 1)) else max(width, 1)
    return [slice(start, min(start + step, width)) for start in range(0, width, step)]


def product_reason() -> str:
    """Which library `product` uses on a CPU, and why."""
    if _onednn_takes(torch.empty(1, 1)):
        return "oneDNN, whose AVX-512 kernels run on processors of every maker"
    if made_by_intel():
        return "torch.mm: MKL is at its best on Intel's processors"
    return f"torch.mm: no oneDNN, or no AVX-512 ({torch.backends.cpu.get_cpu_capability()})"


@functools.cache
def made_by_intel() -> bool:
    """Whether this processor calls itself Intel's, as far as the system tells."""
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return "GenuineIntel" in platform.processor()


def _onednn_takes(matrix: Tensor) -> bool:
    # Anything but a dense matrix would fall to oneDNN's reference loop, a thousand times slower.
    return bool(
        matrix.device.type == "cpu"
        and matrix.dtype == torch.float32
        and matrix.numel() > 0
        and (matrix.is_contiguous() or matrix.t().is_contiguous())
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and not made_by_intel()
    )
