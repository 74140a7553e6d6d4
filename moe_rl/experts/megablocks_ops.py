"""Stand-in for `megablocks_ops`, the compiled extension that the megablocks package imports.

The extension is CUDA code of seven small functions around a sort. Its build fails on current CUDA
(databricks/megablocks issue 180), and needs a GPU's toolkit in any case. These are the same
functions in torch, for any device: exact, and no slower where it matters, since the work is in the
package's Triton kernels and in the matrix products.

Shapes: S assignments of tokens to experts, E experts.
"""

import importlib.util
import sys
from types import ModuleType

import torch
from torch import Tensor

NAME = "megablocks_ops"


def histogram(x: Tensor, num_bins: int) -> Tensor:
    """Counts of 0..num_bins-1 in `x [S]` as int32 `[num_bins]`; in `[B, S]`, row by row."""
    if x.ndim == 2:
        return torch.stack([histogram(row, num_bins) for row in x])
    return torch.bincount(x.long(), minlength=int(num_bins))[: int(num_bins)].to(torch.int32)


def sort(x: Tensor, end_bit: int, x_out: Tensor, iota_out: Tensor) -> None:
    """Sort `x [S]` stably into `x_out`, with the order in `iota_out`; all bits, not `end_bit`."""
    values, order = torch.sort(x, stable=True)
    x_out.copy_(values)
    iota_out.copy_(order)


def inclusive_cumsum(x: Tensor, dim: int, out: Tensor) -> None:
    """Sums up to and with each element."""
    out.copy_(x.cumsum(dim))


def exclusive_cumsum(x: Tensor, dim: int, out: Tensor) -> None:
    """Sums before each element."""
    out.copy_(x.cumsum(dim) - x)


def indices(padded_bins: Tensor, block_size: int, rows: int, columns: int, out: Tensor) -> None:
    """Column block of each block of a block-diagonal matrix, `out [rows * columns]`.

    Row block r belongs to the first expert e with r < padded_bins[e] / block_size, and has the
    column blocks e * columns to (e + 1) * columns - 1.
    """
    row = torch.arange(rows, dtype=padded_bins.dtype, device=padded_bins.device)
    expert = torch.searchsorted(padded_bins // block_size, row, right=True)
    column = torch.arange(columns, device=padded_bins.device)
    out.copy_((expert[:, None] * columns + column).flatten())


def replicate_forward(x: Tensor, bins: Tensor, out: Tensor) -> None:
    """`x [B, E]` to `out [B, S]`: the value of the expert of each assignment."""
    out.copy_(x[:, _expert_of(bins, out.shape[1])])


def replicate_backward(grad: Tensor, bins: Tensor, out: Tensor) -> None:
    """`grad [B, S]` to `out [B, E]`: sums over each expert's assignments."""
    out.zero_().index_add_(1, _expert_of(bins, grad.shape[1]), grad)


def _expert_of(bins: Tensor, length: int) -> Tensor:
    place = torch.arange(length, dtype=bins.dtype, device=bins.device)
    return torch.searchsorted(bins, place, right=True)


FUNCTIONS = (
    *(histogram, sort, inclusive_cumsum, exclusive_cumsum),
    *(indices, replicate_forward, replicate_backward),
)


def is_compiled() -> bool:
    """Whether the compiled extension is installed."""
    module = sys.modules.get(NAME)
    if module is not None:
        return getattr(module, "__file__", None) is not None
    return importlib.util.find_spec(NAME) is not None


def install() -> None:
    """Put the stand-in where megablocks looks, unless the compiled extension is there."""
    if NAME in sys.modules or is_compiled():
        return
    module = ModuleType(NAME, __doc__)
    for function in FUNCTIONS:
        setattr(module, function.__name__, function)
    sys.modules[NAME] = module
