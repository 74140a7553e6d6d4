"""Experts on a CPU: one autograd node over expert-sorted tokens, weights of unchanged layout.

    y_t = sum_k w_tk * D_e ( silu(G_e x_t) * (U_e x_t) ),   e = top_k_index[t, k]

Shapes: T tokens, K experts per token, S = T*K assignments, E experts, H hidden, I expert width.
G_e and U_e are the two halves of gate_up_proj[e] [2I, H]; D_e is down_proj[e] [H, I].

Why one hand-written node: at this size the matrix products are a third of the time of stock code;
the rest is copies, index ops and autograd nodes. Three choices save most of it:

1. The gate weight multiplies the I-wide activation, not the H-wide output, so the backward gathers
   the output gradient as it is, and un-sorting is a plain gather-and-add (`embedding_bag`).
2. Every expert's product is written into its slice of one tensor: no split, cat or zero fill; and
   numpy makes it, whose call costs a microsecond and whose OpenBLAS runs AVX-512 kernels on
   processors of every maker, where torch's MKL does not (see `moe_rl.kernels.product`).
3. Where every expert is on for every token (K = E) nothing is sorted: experts stand side by side
   in two dense products.

All sums run in a fixed order, so results repeat bitwise.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.activations import SiLUActivation
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    _default_apply_gate,
    grouped_mm_experts_forward,
)

from moe_rl.kernels.product import product, product_plus

NAME = "cpu_sorted"


def cpu_sorted_experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Sum over each token's experts of weight times gated MLP, `[T, H]`.

    Args:
        self: transformers experts module with `gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I].
        hidden_states: `[T, H]`.
        top_k_index: int64 `[T, K]`, ids in 0..E-1, distinct within a row.
        top_k_weights: `[T, K]`.

    Experts this code does not know (biases, transposed or interleaved weights, another activation,
    another dtype than the input's, not on a CPU) go to transformers' `grouped_mm`.
    An expert without tokens gets a zero gradient; frozen weights get none.

    Raises:
        ValueError: an expert id outside 0..E-1.
    """
    if not supports(self, hidden_states):
        return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    return run_experts(hidden_states, top_k_index, top_k_weights, self.gate_up_proj, self.down_proj)


def run_experts(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    residual: Tensor | None = None,
    turned: "Turned | None" = None,
) -> Tensor:
    """The formula above on plain tensors, plus `residual` `[T, H]` if given.

    `turned` is `turn_weights` of the two weights where the caller has it; without a graph alone.
    """
    weights = top_k_weights.to(hidden_states.dtype)
    dense = top_k_index.shape[1] == gate_up_proj.shape[0]
    inputs = (hidden_states, top_k_index, weights, gate_up_proj, down_proj, residual)
    if dense:
        return _DenseExperts.apply(*inputs)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return _SortedExperts.apply(*inputs)
    return _sorted_experts(*inputs, turned)[0]


class Turned(NamedTuple):
    """Both weights with their last axes swapped."""

    gate_up: Tensor
    """`[E, H, 2I]`."""
    down: Tensor
    """`[E, I, H]`."""


def turn_weights(gate_up_proj: Tensor, down_proj: Tensor) -> Turned:
    """Contiguous copies, worth their while for weights that are read many times: OpenBLAS
    multiplies a few rows twice as fast by a matrix that it need not turn itself.
    """
    return Turned(gate_up_proj.transpose(1, 2).contiguous(), down_proj.transpose(1, 2).contiguous())


def register() -> None:
    """Make `experts_implementation="cpu_sorted"` known to transformers; may be repeated."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, cpu_sorted_experts_forward)


def supports(experts: Any, hidden_states: Tensor) -> bool:
    """Whether these experts, on this input, are the ones of the formula."""
    return (
        hidden_states.device.type == "cpu"
        and hidden_states.dtype == experts.gate_up_proj.dtype == experts.down_proj.dtype
        and isinstance(getattr(experts, "act_fn", None), nn.SiLU | SiLUActivation)
        and getattr(type(experts), "_apply_gate", None) is _default_apply_gate
        and experts.has_gate
        and experts.is_concatenated
        and not experts.has_bias
        and not experts.is_transposed
        # transformers 5.17 has neither of these two.
        and not getattr(experts, "has_post_expert_norm", False)
        and not getattr(experts, "_is_expert_parallel", False)
    )


class _Sorted(NamedTuple):
    """Assignments of tokens to experts, in the order of experts."""

    order: Tensor
    """int64 `[S]`: which assignment (t * K + k) stands here."""
    tokens: Tensor
    """int64 `[S]`: its token t."""
    inverse: Tensor
    """int64 `[T, K]`: where assignment (t, k) stands."""
    ends: Tensor
    """int32 `[E]`: where each expert's assignments end."""


def _sort_by_expert(top_k_index: Tensor, num_experts: int) -> _Sorted:
    ids = top_k_index.reshape(-1).numpy()
    counts = _counts(ids, num_experts)
    # numpy sorts 8- and 16-bit integers by radix, four times as fast as torch sorts 64-bit ones.
    small = np.uint8 if num_experts <= 256 else np.uint16 if num_experts <= 65536 else ids.dtype
    order = ids.astype(small).argsort(kind="stable")
    inverse = np.empty_like(order)
    inverse[order] = np.arange(order.size)
    return _Sorted(
        torch.from_numpy(order),
        torch.from_numpy(order // top_k_index.shape[1]),
        torch.from_numpy(inverse).view(top_k_index.shape),
        torch.from_numpy(counts.cumsum(dtype=np.int32)),
    )


def _counts(ids: np.ndarray, num_experts: int) -> np.ndarray:
    """Assignments of each expert `[E]`; also the check of the ids."""
    counts = None
    with contextlib.suppress(ValueError):  # a negative id
        counts = np.bincount(ids, minlength=num_experts)
    if counts is None or counts.size > num_experts:
        raise ValueError(
            f"top_k_index has expert ids from {ids.min()} to {ids.max()}, but the layer has "
            f"{num_experts} experts: pass ids in 0..{num_experts - 1}"
        )
    return counts


def _mm_by_expert(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """rows `[S, A]`, matrices `[E, A, B]` -> `[S, B]`: each expert's rows times its matrix."""
    if not _numpy_takes(rows):
        return F.grouped_mm(rows, matrices, offs=ends)
    out = rows.new_empty(rows.shape[0], matrices.shape[2])
    results, left, right = out.numpy(), rows.numpy(), matrices.numpy()
    for expert, start, end in _parts(ends):
        np.matmul(left[start:end], right[expert], out=results[start:end])
    return out


def _outer_by_expert(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """left `[S, A]`, right `[S, B]` -> `[E, A, B]`: sum over each expert's rows of left^T right."""
    if not _numpy_takes(left):
        return F.grouped_mm(left.t(), right, offs=ends)
    out = left.new_empty(ends.shape[0], left.shape[1], right.shape[1])
    results, columns, rows = out.numpy(), left.t().numpy(), right.numpy()
    for expert, start, end in _parts(ends):
        # No rows: the product is exactly zero.
        np.matmul(columns[:, start:end], rows[start:end], out=results[expert])
    return out


def _numpy_takes(rows: Tensor) -> bool:
    """numpy has no 16-bit products; torch's grouped one does."""
    return rows.dtype in (torch.float32, torch.float64)


def _parts(ends: Tensor) -> Iterator[tuple[int, int, int]]:
    """(expert, first row, row after its last)."""
    start = 0
    for expert, end in enumerate(ends.tolist()):
        yield expert, start, end
        start = end


def _sum_of_rows(rows: Tensor, index: Tensor) -> Tensor:
    """rows[S, H], index[T, K] -> [T, H]: sum over k of rows[index[t, k]], in that order."""
    if index.shape[1] == 1:
        return rows.index_select(0, index.view(-1))
    offsets = torch.arange(0, index.numel(), index.shape[1])
    return torch.embedding_bag(rows, index.view(-1), offsets, mode=0)[0]  # mode 0: sum


def _gate_backward(d_act: Tensor, gate_up_out: Tensor, silu: Tensor, width: int) -> Tensor:
    """Gradient of silu(gate) * up to [..., gate | up]. Overwrites d_act."""
    d_gate_up = torch.empty_like(gate_up_out)
    torch.mul(d_act, silu, out=d_gate_up[..., width:])
    d_act.mul_(gate_up_out[..., width:])
    torch.ops.aten.silu_backward.grad_input(
        d_act, gate_up_out[..., :width], grad_input=d_gate_up[..., :width]
    )
    return d_gate_up


def _sorted_experts(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    residual: Tensor | None,
    turned: "Turned | None" = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The output, and what the backward needs of the way there."""
    if turned is None:
        turned = Turned(gate_up_proj.transpose(1, 2), down_proj.transpose(1, 2))
    num_experts, width = gate_up_proj.shape[0], down_proj.shape[2]
    order, tokens, inverse, ends = _sort_by_expert(top_k_index, num_experts)
    x = hidden_states.index_select(0, tokens)
    weights = top_k_weights.reshape(-1, 1).index_select(0, order)
    gate_up = _mm_by_expert(x, turned.gate_up, ends)
    silu = F.silu(gate_up[:, :width])
    act = silu * gate_up[:, width:]
    scaled = act * weights
    out = _sum_of_rows(_mm_by_expert(scaled, turned.down, ends), inverse)
    kept = (tokens, inverse, ends, weights, x, gate_up, silu, act, scaled)
    return out if residual is None else out.add_(residual), kept


class _SortedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        out, kept = _sorted_experts(*inputs)
        gate_up_proj, down_proj = inputs[3:5]
        ctx.save_for_backward(*kept, gate_up_proj, down_proj)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (
            tokens, inverse, ends, weights, x, gate_up_out, silu, act, scaled, gate_up_proj,
            down_proj,
        ) = ctx.saved_tensors  # fmt: skip
        need_x, _, need_weights, need_gate_up, need_down, need_residual = ctx.needs_input_grad
        d_x = d_weights = d_gate_up_proj = d_down_proj = None
        dy = grad.index_select(0, tokens)
        if need_down:
            d_down_proj = _outer_by_expert(dy, scaled, ends)
        if need_x or need_weights or need_gate_up:
            d_scaled = _mm_by_expert(dy, down_proj, ends)
            if need_weights:
                d_sorted = (d_scaled * act).sum(1)
                d_weights = d_sorted.index_select(0, inverse.view(-1)).view(inverse.shape)
            if need_x or need_gate_up:
                d_gate_up = _gate_backward(
                    d_scaled.mul_(weights), gate_up_out, silu, down_proj.shape[2]
                )
                if need_gate_up:
                    d_gate_up_proj = _outer_by_expert(d_gate_up, x, ends)
                if need_x:
                    d_x = _sum_of_rows(_mm_by_expert(d_gate_up, gate_up_proj, ends), inverse)
        d_residual = grad if need_residual else None
        return d_x, None, d_weights, d_gate_up_proj, d_down_proj, d_residual


class _DenseExperts(torch.autograd.Function):
    """Every expert on for every token: E experts of width I are one MLP of width E*I."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        residual: Tensor | None,
    ) -> Tensor:
        num_experts, width = gate_up_proj.shape[0], down_proj.shape[2]
        _counts(top_k_index.reshape(-1).numpy(), num_experts)
        weights = torch.zeros_like(top_k_weights).scatter_(1, top_k_index, top_k_weights)
        weights = weights.unsqueeze(2)
        gate_up_out = product(hidden_states, gate_up_proj.flatten(0, 1).t())
        gate_up_out = gate_up_out.view(-1, num_experts, 2 * width)
        silu = F.silu(gate_up_out[..., :width])
        act = silu * gate_up_out[..., width:]
        scaled = (act * weights).flatten(1)
        side_by_side = down_proj.transpose(1, 2).reshape(num_experts * width, -1)
        ctx.save_for_backward(
            hidden_states,
            top_k_index,
            weights,
            gate_up_out,
            silu,
            act,
            scaled,
            gate_up_proj,
            side_by_side,
        )
        if residual is None:
            return product(scaled, side_by_side)
        return product_plus(scaled, side_by_side, residual)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, top_k_index, weights, gate_up_out, silu, act, scaled, gate_up_proj, side_by_side = (
            ctx.saved_tensors
        )
        need_x, _, need_weights, need_gate_up, need_down, need_residual = ctx.needs_input_grad
        num_experts, width = act.shape[1:]
        d_x = d_weights = d_gate_up_proj = d_down_proj = None
        if need_down:
            d_down_proj = product(scaled.t(), grad).view(num_experts, width, -1).transpose(1, 2)
        if need_x or need_weights or need_gate_up:
            d_scaled = product(grad, side_by_side.t()).view(act.shape)
            if need_weights:
                d_weights = (d_scaled * act).sum(2).gather(1, top_k_index)
            if need_x or need_gate_up:
                d_gate_up = _gate_backward(d_scaled.mul_(weights), gate_up_out, silu, width)
                d_gate_up = d_gate_up.flatten(1)
                if need_gate_up:
                    d_gate_up_proj = product(d_gate_up.t(), x).view(gate_up_proj.shape)
                if need_x:
                    d_x = product(d_gate_up, gate_up_proj.flatten(0, 1))
        d_residual = grad if need_residual else None
        return d_x, None, d_weights, d_gate_up_proj, d_down_proj, d_residual
