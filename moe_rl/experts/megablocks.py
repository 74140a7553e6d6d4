"""Experts by Megablocks (arXiv 2211.15841), dropless, for any transformers MoE.

    y_t = sum_k w_tk * D_e gate(U_e x_t),   e = top_k_index[t, k]

Two routes, of which none drops or pads a token of the result:

- `megablocks`: sort, histogram, gather, grouped product, gate, grouped product, scatter. Any size.
- `megablocks_sparse`: the paper's. Rows are padded to blocks of 128; one block-sparse product (sdd)
  makes gate and up of all experts, another (dsd) multiplies the result by the down matrices. Widths
  must be multiples of 128, and the down matrices are copied in every forward.

Shapes: T tokens, K experts per token, S = T*K assignments, E experts, H hidden, I expert width.
The experts' tensors are those of transformers: `gate_up_proj [E, 2I, H]` (or `up_proj [E, I, H]`),
`down_proj [E, H, I]`; transposed, interleaved and biased ones too, on the first route.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from moe_rl.experts.megablocks_package import load
from moe_rl.kernels.choose import interpreting

GROUPED = "megablocks"
SPARSE = "megablocks_sparse"
BLOCK = 128  # the block of stk's kernels
# The kernels index elements by 32 bits (databricks/megablocks issue 186).
MOST_ELEMENTS = 2**31


class _Bins(NamedTuple):
    """Assignments in the order of experts."""

    indices: Tensor
    """int32 `[S]`: which assignment (t * K + k) stands here."""
    bin_ids: Tensor
    """int32 `[S]`: its expert."""
    counts: Tensor
    """int32 `[E]`: assignments of each expert."""
    ends: Tensor
    """int32 `[E]`: where they end."""


def megablocks_experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The grouped route: sum over each token's experts, `[T, H]`.

    Args:
        self: transformers experts module.
        hidden_states: `[T, H]`.
        top_k_index: int64 `[T, K]`, ids in 0..E-1.
        top_k_weights: `[T, K]`.

    Raises:
        ValueError: megablocks is not installed; expert-parallel experts; an id outside 0..E-1 (on
            a CPU, where looking costs nothing); T*K*H beyond 2^31; bfloat16 in the interpreter.
    """
    _require_in_bounds(self, GROUPED, hidden_states, top_k_index)
    if hidden_states.shape[0] == 0:
        return hidden_states * 1.0
    ops, top_k = load().ops, top_k_index.shape[1]
    bins = _sort_by_expert(top_k_index, self.num_experts)
    x = ops.gather(hidden_states.contiguous(), bins.indices, bins.bin_ids, bins.ends, top_k)
    name = "gate_up_proj" if self.has_gate else "up_proj"
    x = _linear(self, name, x, bins)
    x = self._apply_gate(x) if self.has_gate else self.act_fn(x)
    y = _linear(self, "down_proj", x, bins)
    if getattr(self, "has_post_expert_norm", False):  # absent from transformers 5.17
        y = self.post_expert_norm(y)
    weights = top_k_weights.flatten().to(y.dtype)
    return ops.scatter(y, bins.indices, bins.bin_ids, weights, bins.ends, top_k)


def megablocks_sparse_experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The block-sparse route. Arguments, result and errors as in the grouped route, and

    Raises:
        ValueError: experts with biases, interleaved gates, a gate of their own or a norm, or
            widths that are no multiples of 128.
    """
    _require_in_bounds(self, SPARSE, hidden_states, top_k_index)
    hidden, width = _require_blocks(self)
    if hidden_states.shape[0] == 0:
        return hidden_states * 1.0
    ops, stk = load()
    num_experts, top_k = self.num_experts, top_k_index.shape[1]
    bins = _sort_by_expert(top_k_index, num_experts)
    padded = ops.inclusive_cumsum(ops.round_up(bins.counts, BLOCK), 0).view(-1)
    where = bins.indices, bins.bin_ids
    x = ops.padded_gather(hidden_states.contiguous(), *where, bins.ends, padded, top_k)
    rows, blocks = x.shape[0] // BLOCK, width // BLOCK
    # gate and up of one expert stand side by side, so one product makes both.
    wide = _topology(padded, rows, 2 * blocks, num_experts)
    gate_up = stk.ops.sdd(x, _columns(self, num_experts * 2 * width, hidden), wide).data
    gate, up = gate_up.view(rows, 2, blocks, BLOCK, BLOCK).unbind(1)
    act = (self.act_fn(gate) * up).reshape(-1, BLOCK, BLOCK)
    narrow = _topology(padded, rows, blocks, num_experts, act)
    down = self.down_proj if self.is_transposed else self.down_proj.transpose(1, 2)
    y = stk.ops.dsd(narrow, down.reshape(num_experts * width, hidden))
    weights = top_k_weights.flatten().to(y.dtype)
    return ops.padded_scatter(y, *where, weights, bins.ends, padded, top_k)


def register() -> None:
    """Make both routes known to transformers; may be repeated. Imports no megablocks."""
    ALL_EXPERTS_FUNCTIONS.register(GROUPED, megablocks_experts_forward)
    ALL_EXPERTS_FUNCTIONS.register(SPARSE, megablocks_sparse_experts_forward)


@torch.no_grad()
def _sort_by_expert(top_k_index: Tensor, num_experts: int) -> _Bins:
    ops = load().ops
    flat = top_k_index.flatten().int()
    bin_ids, indices = ops.sort(flat, max((num_experts - 1).bit_length(), 1))
    counts = ops.histogram(flat, num_experts)
    return _Bins(indices, bin_ids, counts, ops.inclusive_cumsum(counts, 0).view(-1))


def _linear(experts: Any, name: str, x: Tensor, bins: _Bins) -> Tensor:
    """Each row of `x [S, A]` times the matrix of its expert, plus its bias: `[S, B]`."""
    weight = getattr(experts, name)
    out = grouped_product(x, weight if experts.is_transposed else weight.transpose(1, 2), bins.ends)
    if experts.has_bias:
        out = out + getattr(experts, f"{name}_bias").index_select(0, bins.bin_ids)
    return out


def grouped_product(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """rows `[S, A]` in the order of experts, matrices `[E, A, B]`, ends int32 `[E]` -> `[S, B]`."""
    size = rows.element_size()
    aligned = matrices.shape[1] * size % 16 == 0 == matrices.shape[2] * size % 16
    if rows.dtype in (torch.float32, torch.bfloat16, torch.float16) and aligned:
        return F.grouped_mm(rows, matrices, offs=ends)
    parts = rows.tensor_split(ends[:-1].long().cpu())
    return torch.cat([part @ matrix for part, matrix in zip(parts, matrices, strict=True)])


def _columns(experts: Any, columns: int, hidden: int) -> Tensor:
    """The gate and up matrices of all experts side by side, `[H, E*2I]`, without a copy if stored
    by rows."""
    weight = experts.gate_up_proj
    if experts.is_transposed:
        return weight.permute(1, 0, 2).reshape(hidden, columns)
    return weight.reshape(columns, hidden).t()


@torch.no_grad()
def _topology(
    padded: Tensor, rows: int, columns: int, num_experts: int, data: Tensor | None = None
) -> Any:
    """stk matrix of `rows` by `num_experts * columns` blocks, dense in each row's own expert."""
    ops, stk = load()
    # int32: stk multiplies ids by the block size in the ids' own type, and under Triton 3.2 and
    # later int16 overflows from block 256 on.
    column = ops.topology(padded, BLOCK, rows, columns).int()
    count = torch.arange(rows + 1, device=padded.device, dtype=torch.int32)
    row = count[:-1].repeat_interleave(columns)
    order = torch.argsort(column, stable=True)
    per_column = ops.histogram(column, num_experts * columns)
    ends = ops.inclusive_cumsum(per_column, 0).view(-1)
    shape = torch.Size((rows * BLOCK, num_experts * columns * BLOCK))
    if data is None:
        data = torch.empty(column.numel(), BLOCK, BLOCK, device="meta")
    return stk.Matrix(
        shape,
        data,
        row,
        column,
        count * columns,
        row[order],
        torch.cat([ends.new_zeros(1), ends]),
        order.int(),
    )


def _require_in_bounds(
    experts: Any, route: str, hidden_states: Tensor, top_k_index: Tensor
) -> None:
    if getattr(experts, "_is_expert_parallel", False):
        raise ValueError(
            f"experts: {route} does not run expert-parallel experts, whose ids of absent experts "
            "would be written out of bounds. Use experts_implementation='grouped_mm'."
        )
    elements = top_k_index.numel() * hidden_states.shape[1]
    if elements >= MOST_ELEMENTS:
        raise ValueError(
            f"hidden_states: {top_k_index.numel()} assignments of width {hidden_states.shape[1]} "
            f"are {elements} elements, beyond the {MOST_ELEMENTS} that Megablocks' kernels can "
            "address. Split the batch."
        )
    if interpreting() and hidden_states.dtype == torch.bfloat16:
        raise ValueError(
            "hidden_states: Triton's interpreter multiplies bfloat16 as raw integers, silently. "
            "Use dtype float32 under TRITON_INTERPRET=1."
        )
    if hidden_states.device.type == "cpu" and top_k_index.numel():
        low, high = (int(value) for value in top_k_index.aminmax())
        if low < 0 or high >= experts.num_experts:
            raise ValueError(
                f"top_k_index has expert ids from {low} to {high}, but the layer has "
                f"{experts.num_experts} experts: pass ids in 0..{experts.num_experts - 1}"
            )


def _require_blocks(experts: Any) -> tuple[int, int]:
    """H and I of experts that the block-sparse route can run."""
    kind = type(experts).__name__
    refused = {
        "have biases": experts.has_bias,
        "have no gate": not experts.has_gate,
        "interleave gate and up": not experts.is_concatenated,
        "have a gate of their own": type(experts)._apply_gate is not _default_apply_gate,
        "have a norm behind them": getattr(experts, "has_post_expert_norm", False),
    }
    for why, holds in refused.items():
        if holds:
            raise ValueError(
                f"experts: {SPARSE} cannot run {kind}, which {why}. Use {GROUPED}, which can."
            )
    hidden, width = experts.down_proj.shape[1:]
    if experts.is_transposed:
        hidden, width = width, hidden
    if hidden % BLOCK or width % BLOCK:
        raise ValueError(
            f"experts: {SPARSE} needs widths that are multiples of {BLOCK}; {kind} has hidden "
            f"{hidden} and expert width {width}. Use {GROUPED}, which takes any."
        )
    return hidden, width
