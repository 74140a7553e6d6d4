"""The attention half of a decoder layer as one autograd node, and without a graph.

    y = h + W_o attention(rms_norm(h))         with the norm and the residual
    y = W_o attention(h)                       without: the attention module alone

The first norm's weight is folded into the joined projection weights, so only h / rms(h) is made
and kept: with normed rows n, joined weights J and norm weight w, the product is n (J w)^T, and
d_w = sum over rows of J * d(J w) needs no further pass over the hidden states.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_rl.cpu.group_attention import Segment, attend, attend_backward, segments_of, spread_rows
from moe_rl.cpu.heads import (
    LN2,
    HeadShape,
    HeadWeights,
    LaidGradients,
    Normed,
    Part,
    join_weights,
    lay_out,
    lay_out_backward,
    project,
    project_backward,
    project_input_backward,
    split_gradients,
)
from moe_rl.cpu.rms_norm import inverse_rms
from moe_rl.kernels.product import product, product_plus


class BlockWeights(NamedTuple):
    """Parameters of one attention module, and of the norm before it where that is included."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_norm: Tensor
    k_norm: Tensor
    o: Tensor
    norm: Tensor | None
    """`[H]`; None: the input is normed already, and no residual is added."""


class FoldedWeights(NamedTuple):
    """`BlockWeights` as the no-graph path multiplies with them."""

    heads: HeadWeights
    """With the norm's weight in the joined ones."""
    o: Tensor
    """`[queries * D, H]`, contiguous: MKL is up to a fifth faster on untransposed operands."""


def fold_weights(weights: BlockWeights, shape: HeadShape) -> FoldedWeights:
    """Prepare weights for calls without a graph."""
    heads = _joined(weights, shape)
    if weights.norm is not None:
        heads = heads._replace(joined=heads.joined * weights.norm)
    return FoldedWeights(heads, weights.o.t().contiguous())


def _joined(weights: BlockWeights, shape: HeadShape) -> HeadWeights:
    return join_weights(*weights[:5], shape)


def attention_block(
    hidden: Tensor,
    weights: BlockWeights,
    prompt: tuple[Tensor, Tensor] | None,
    shape: HeadShape,
    parts: tuple[Part, ...],
    norm_eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The block on hidden `[N, H]` with a graph; also keys and values of the last part.

    Args:
        hidden: rows of all parts.
        weights: the module's parameters.
        prompt: keys and values `[P, kv, Sp, D]` of prompts read before, for a single part.
        shape: head sizes.
        parts: one part, or prompts and then the responses to them.
        norm_eps: the norm's epsilon, if `weights` has the norm.
    """
    return _AttentionBlock.apply(
        hidden, *weights, *(prompt or (None, None)), shape, parts, norm_eps
    )


class _AttentionBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        weights = BlockWeights(*arguments[:7])
        prompt_keys, prompt_values, shape, parts, norm_eps = arguments[7:]
        heads = _joined(weights, shape)
        normed_hidden, hidden_scale, folded = hidden, None, heads.joined
        if weights.norm is not None:
            hidden_scale = inverse_rms(hidden, norm_eps)
            normed_hidden = hidden * hidden_scale
            folded = heads.joined * weights.norm
        made = project(normed_hidden, folded, shape)
        out = hidden.new_empty(hidden.shape[0], shape.queries * shape.head_dim)
        prompt = None if prompt_keys is None else (prompt_keys, prompt_values)
        saved = [
            normed_hidden, hidden_scale, weights.norm, heads.joined, folded, weights.o,
            heads.q_norm, heads.k_norm, *made.queries, *made.keys, out, prompt_keys, prompt_values,
        ]  # fmt: skip
        ctx.fixed = len(saved)
        laid = lay_out(made, heads, parts, shape)
        for part, (queries, keys, values) in zip(parts, laid, strict=True):
            segments = segments_of(part, keys, values, prompt)
            attention, inverse = attend(
                queries, segments, heads.bits, spread_rows(out, part, shape)
            )
            saved += [queries, keys, values, inverse, *attention]
            prompt = (keys.flatten(2, 3), values.flatten(2, 3))
        ctx.save_for_backward(*saved)
        ctx.shape, ctx.parts = shape, parts
        ctx.set_materialize_grads(False)
        if weights.norm is None:
            return product(out, weights.o.t()), keys, values
        return product_plus(out, weights.o.t(), hidden), keys, values

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_block: Tensor | None, d_keys: Tensor | None, d_values: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        shape, need, tensors = ctx.shape, ctx.needs_input_grad, ctx.saved_tensors
        (
            normed_hidden, hidden_scale, norm, joined, folded, w_o, q_norm, k_norm, q_rows, q_scale,
            k_rows, k_scale, out, prompt_keys, prompt_values,
        ) = tensors[: ctx.fixed]  # fmt: skip
        if d_block is None:
            d_block = normed_hidden.new_zeros(normed_hidden.shape[0], w_o.shape[0])
        d_o = product(d_block.t(), out) if need[6] else None
        d_out = product(d_block, w_o)
        prompt = None if prompt_keys is None else (prompt_keys, prompt_values)
        states = _states(ctx.parts, tensors[ctx.fixed :], prompt)
        laid = []
        from_later = (d_keys, d_values)
        if d_keys is not None:
            from_later = (d_keys / LN2, d_values)
        for part, queries, segments, attention, inverse in reversed(states):
            d_queries, d_segments = attend_backward(
                spread_rows(d_out, part, shape), spread_rows(out, part, shape),
                queries, segments, attention, inverse,
            )  # fmt: skip
            own = [
                mine if later is None else mine.add_(later.view_as(mine))
                for mine, later in zip(d_segments[0], from_later, strict=True)
            ]
            laid.append(LaidGradients(part, d_queries, *own))
            from_later = d_segments[1] if len(d_segments) > 1 else (None, None)
        d_products, d_norms = lay_out_backward(
            laid, Normed(q_rows, q_scale), Normed(k_rows, k_scale), q_norm, k_norm, shape
        )
        d_joined = d_norm = d_hidden = None
        if any(need[1:4]) or need[7]:
            d_joined = project_backward(d_products, normed_hidden, joined, shape)
            if norm is not None:
                d_norm = (d_joined * joined).sum(0) if need[7] else None
                d_joined.mul_(norm)
        if need[0]:
            d_hidden = project_input_backward(d_products, folded, shape)
            if norm is not None:
                along = (d_hidden * normed_hidden).sum(-1, keepdim=True)
                d_hidden.addcmul_(normed_hidden, along, value=-1.0 / norm.shape[0])
                d_hidden = torch.addcmul(d_block, d_hidden, hidden_scale)
        d_weights = split_gradients(d_joined, *d_norms, shape)
        d_prompt_keys, d_prompt_values = from_later
        if d_prompt_keys is not None:
            d_prompt_keys = d_prompt_keys.mul_(LN2)
        grads = (d_hidden, *d_weights, d_o, d_norm, d_prompt_keys, d_prompt_values)
        return *(g if n else None for g, n in zip(grads, need, strict=False)), None, None, None


def _states(
    parts: tuple[Part, ...],
    saved: tuple[Tensor, ...],
    prompt: tuple[Tensor, Tensor] | None,
) -> list[tuple[Part, Tensor, list[Segment], tuple[Tensor, ...], Tensor]]:
    """What the forward kept of each part: (part, queries, segments, weights, inverse sums)."""
    states, position = [], 0
    for part in parts:
        queries, keys, values, inverse = saved[position : position + 4]
        segments = segments_of(part, keys, values, prompt)
        end = position + 4 + len(segments)
        states.append((part, queries, segments, saved[position + 4 : end], inverse))
        position = end
        prompt = (keys.flatten(2, 3), values.flatten(2, 3))
    return states
