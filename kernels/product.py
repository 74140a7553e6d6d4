"""Matrix products in full float32, by the fastest library this machine has for them.

PyTorch sends a float32 product on a CPU to MKL, which runs AVX2 code on processors of other makers
even where they have AVX-512. oneDNN, which every x86 build of PyTorch carries for its compiler,
does not look at the maker: one thread of an AMD EPYC with AVX-512 reaches 250 GFLOP/s against
MKL's 110, on the same float32 numbers.
"""

import torch
from torch import Tensor


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


def product_reason() -> str:
    """Which library `product` uses on a CPU, and why."""
    if _onednn_takes(torch.empty(1, 1)):
        return "oneDNN, whose AVX-512 kernels run on processors of every maker"
    return f"torch.mm: no oneDNN, or no AVX-512 ({torch.backends.cpu.get_cpu_capability()})"


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
    )
