"""Attention of grouped responses as one autograd node: projections to weighted values.

Qwen3's attention, for queries at positions t of response g to prompt p:

    q, k = rotary(rms_norm(x W)),   v = x W_v
    out  = sum_s softmax_s(q . k_s * scaling) v_s,   s over the prompt, then over the response

Shapes: P prompts, G responses a prompt, T positions, N = P * G * T rows; `kv` key-value heads, `r`
queries a key-value head, D head size (even), Sp prompt positions, U response keys. Queries are held
as `[P, kv, G, r, T, D]` and keys as `[P, kv, G, U, D]`: read as `[P * kv, G * r * T, D]` they meet
the prompt's keys, read as `[P * kv * G, r * T, D]` their own response's, without a copy.

What differs from stock code, with the same result up to rounding:

1. A prompt is attended once for its G responses: no G-fold copy of its keys, and one large product
   where G small ones were.
2. Query and key rows of the weights are reordered while they are joined, so that the two halves
   that rotary mixes lie side by side: a rotation is one complex product.
3. The softmax runs in powers of two and divides at the end, on D numbers a query instead of a row
   of scores. Its maximum is subtracted only where the norms' weights allow large scores.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_rl.fused_layers.rms_norm import inverse_rms

# Scores in bits up to this stay far from float32's range (2^127) when exponentiated as they are.
_SAFE_BITS = 60.0


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of one call, and its tables that carry no gradient."""

    prompts: int
    group: int
    length: int
    """Query positions T."""
    kv_heads: int
    repeats: int
    """Query heads that share a key-value head, r."""
    head_dim: int
    scaling: float
    eps: float
    turns: Tensor
    """complex `[T, D / 2]` or `[P, 1, G, 1, T, D / 2]`: cos + i sin of every rotary pair."""
    own_mask: Tensor | None
    """float, 1 or 0, broadcast to `[P, kv, G, r, T, U]`; None: all keys of the response seen."""
    prompt_mask: Tensor | None
    """float, 1 or 0, broadcast to `[P, kv, G, r, T, Sp]`; None: the whole prompt is seen."""

    @property
    def query_heads(self) -> int:
        """Query heads."""
        return self.kv_heads * self.repeats


@dataclass(frozen=True)
class Projected:
    """Queries, keys and values of one call, and what the backward of their making needs."""

    queries: Tensor
    """`[P, kv, G, r, T, D]`, rotated, times scaling / ln 2."""
    keys: Tensor
    """`[P, kv, G, T, D]`, rotated."""
    values: Tensor
    """`[P, kv, G, T, D]`."""
    normed: Tensor
    """`[N, heads, D]`: query and key heads after division by their root mean square."""
    inverse_rms: Tensor
    """`[N, heads, 1]`."""


def join_weights(w_q: Tensor, w_k: Tensor, w_v: Tensor, layout: Layout) -> Tensor:
    """Query, key and value weights as one `[heads * D, H]`, rotary pairs side by side."""
    order = _pair_rows(layout.query_heads, layout.kv_heads, layout.head_dim)[0]
    return torch.cat([w_q, w_k, w_v]).index_select(0, order)


def split_weight_gradient(joined: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of `join_weights`' output as gradients of its three inputs."""
    order = _pair_rows(layout.query_heads, layout.kv_heads, layout.head_dim)[1]
    rows, kv_rows = layout.query_heads * layout.head_dim, layout.kv_heads * layout.head_dim
    q, k, v = joined.index_select(0, order).split([rows, kv_rows, kv_rows])
    return q, k, v


@lru_cache(maxsize=32)
def _pair_rows(query_heads: int, kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Row order that puts pair (i, i + D/2) at (2i, 2i + 1) in query and key heads; its inverse."""
    pairs = torch.arange(head_dim).view(2, -1).t().reshape(-1)
    heads = torch.arange(query_heads + kv_heads).unsqueeze(1) * head_dim
    values = torch.arange(kv_heads * head_dim) + heads.numel() * head_dim
    order = torch.cat([(heads + pairs).view(-1), values])
    return order, torch.argsort(order)


def _pairs(weight: Tensor) -> Tensor:
    """A per-head weight `[D]` in the order of `join_weights`."""
    return weight.view(2, -1).t().reshape(-1)


def _unpairs(weight: Tensor) -> Tensor:
    return weight.view(-1, 2).t().reshape(-1)


def _norm_weights(q_norm: Tensor, k_norm: Tensor, layout: Layout) -> Tensor:
    """`[heads, D]`: each head's norm weight, in the order of `join_weights`."""
    queries = _pairs(q_norm).expand(layout.query_heads, -1)
    return torch.cat([queries, _pairs(k_norm).expand(layout.kv_heads, -1)])


def project(x: Tensor, joined: Tensor, q_norm: Tensor, k_norm: Tensor, layout: Layout) -> Projected:
    """Queries, keys and values of x `[N, H]`."""
    size = (layout.prompts, layout.group, layout.length)
    kv, r, d = layout.kv_heads, layout.repeats, layout.head_dim
    heads = layout.query_heads + kv
    out = torch.mm(x, joined.t())
    raw = out[:, : heads * d].view(-1, heads, d)
    scale = inverse_rms(raw, layout.eps)
    normed = raw * scale
    weighted = normed * _norm_weights(q_norm, k_norm, layout)
    pairs = torch.view_as_complex(weighted.view(*size, heads, d // 2, 2))
    queries = x.new_empty(layout.prompts, kv, layout.group, r, layout.length, d)
    keys = x.new_empty(layout.prompts, kv, layout.group, layout.length, d)
    turns = layout.turns
    torch.mul(
        pairs[..., : kv * r, :].unflatten(3, (kv, r)).permute(0, 3, 1, 4, 2, 5),
        turns * (layout.scaling / math.log(2.0)),
        out=_as_pairs(queries),
    )
    torch.mul(
        pairs[..., kv * r :, :].permute(0, 3, 1, 2, 4), _without_repeats(turns), out=_as_pairs(keys)
    )
    values = out[:, heads * d :].view(*size, kv, d).permute(0, 3, 1, 2, 4).contiguous()
    return Projected(queries, keys, values, normed, scale)


def _as_pairs(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def _without_repeats(turns: Tensor) -> Tensor:
    """The table without its axis of repeated heads, which keys do not have."""
    return turns if turns.dim() == 2 else turns.squeeze(3)


def project_backward(
    d_queries: Tensor,
    d_keys: Tensor,
    d_values: Tensor,
    projected: tuple[Tensor, Tensor],
    norms: tuple[Tensor, Tensor],
    layout: Layout,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (product with the joined weights `[N, rows]`, q_norm `[D]`, k_norm `[D]`).

    `d_queries` is the gradient of the rotated queries before their factor scaling / ln 2, up to
    `scaling`, which is applied here.
    """
    normed, scale = projected
    size = (layout.prompts, layout.group, layout.length)
    kv, r, d = layout.kv_heads, layout.repeats, layout.head_dim
    heads = layout.query_heads + kv
    grad = torch.empty_like(normed)
    pairs = torch.view_as_complex(grad.view(*size, heads, d // 2, 2))
    back = layout.turns.conj().resolve_conj()
    torch.mul(
        _as_pairs(d_queries),
        back * layout.scaling,
        out=pairs[..., : kv * r, :].unflatten(3, (kv, r)).permute(0, 3, 1, 4, 2, 5),
    )
    torch.mul(
        _as_pairs(d_keys),
        _without_repeats(back),
        out=pairs[..., kv * r :, :].permute(0, 3, 1, 2, 4),
    )
    d_norms, along = [], []
    for weight, part in zip(norms, (slice(0, kv * r), slice(kv * r, heads)), strict=True):
        products = (grad[:, part] * normed[:, part]).view(-1, d)
        d_norms.append(_unpairs(products.sum(0)))
        along.append(torch.mv(products, _pairs(weight)).view(normed.shape[0], -1, 1))
    grad.mul_(_norm_weights(*norms, layout))
    grad.addcmul_(normed, torch.cat(along, dim=1), value=-1.0 / d)
    out = grad.new_empty(normed.shape[0], (heads + kv) * d)
    torch.mul(grad, scale, out=out[:, : heads * d].view(-1, heads, d))
    out[:, heads * d :].view(*size, kv, d).permute(0, 3, 1, 2, 4).copy_(d_values)
    return out, d_norms[0], d_norms[1]


@dataclass(frozen=True)
class Attended:
    """Unnormalised softmax weights and what divides them."""

    out: Tensor
    """`[P, G, T, kv, r, D]`."""
    prompt_weights: Tensor | None
    """`[P * kv, G * r * T, Sp]`: 2^score, 0 where masked."""
    own_weights: Tensor
    """`[P * kv * G, r * T, U]`."""
    inverse_sum: Tensor
    """`[P, kv, G, r, T]`; a query that sees no key has a finite one, and a result of 0."""


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    prompt_keys: Tensor | None,
    prompt_values: Tensor | None,
    bits: float,
    layout: Layout,
) -> Attended:
    """Softmax attention over the prompt's keys and each response's own.

    Args:
        queries: `[P, kv, G, r, T, D]`, with scaling / ln 2 in them.
        keys: `[P, kv, G, U, D]`.
        values: `[P, kv, G, U, D]`.
        prompt_keys: `[P, kv, Sp, D]`, or None.
        prompt_values: `[P, kv, Sp, D]`, or None.
        bits: no score exceeds this in absolute value.
        layout: sizes and masks.
    """
    rows = queries.shape[:5]
    own_queries = queries.flatten(3, 4).flatten(0, 2)
    own_keys, own_values = keys.flatten(0, 2), values.flatten(0, 2)
    own = torch.bmm(own_queries, own_keys.transpose(1, 2))
    shared = None
    if prompt_keys is not None:
        shared_queries = queries.flatten(2, 4).flatten(0, 1)
        shared = torch.bmm(shared_queries, prompt_keys.flatten(0, 1).transpose(1, 2))
    parts = [(own.view(*rows, -1), layout.own_mask)]
    if shared is not None:
        parts.append((shared.view(*rows, -1), layout.prompt_mask))
    if bits > _SAFE_BITS:
        _subtract_maximum(parts)
    total = torch.zeros(rows, dtype=queries.dtype, device=queries.device)
    for scores, mask in parts:
        scores.exp2_()
        if mask is not None:
            scores.mul_(mask)
        total += scores.sum(-1)
    inverse = total.clamp_(min=torch.finfo(total.dtype).tiny).reciprocal_()
    if shared is None or prompt_values is None:
        summed = torch.bmm(own, own_values)
    else:
        summed = torch.bmm(shared, prompt_values.flatten(0, 1))
        summed.view(own_queries.shape).baddbmm_(own, own_values)
    out = queries.new_empty(rows[0], rows[2], rows[4], rows[1], rows[3], queries.shape[5])
    torch.mul(summed.view(queries.shape), inverse.unsqueeze(-1), out=out.permute(0, 3, 1, 4, 2, 5))
    return Attended(out, shared, own, inverse)


def _subtract_maximum(parts: list[tuple[Tensor, Tensor | None]]) -> None:
    for scores, mask in parts:
        if mask is not None:
            scores.masked_fill_(mask == 0, -math.inf)
    maxima = [scores.amax(-1, keepdim=True) for scores, _ in parts]
    maximum = torch.stack(maxima).amax(0)
    # A query that sees no key has the maximum -inf, and -inf - (-inf) is not a number.
    maximum.clamp_(min=torch.finfo(maximum.dtype).min)
    for scores, _ in parts:
        scores.sub_(maximum)


def score_bits(q_norm: Tensor, k_norm: Tensor, layout: Layout) -> float:
    """Bound on |score| / ln 2: a normed head has at most length sqrt(D) times its weight."""
    largest = q_norm.detach().abs().max() * k_norm.detach().abs().max()
    return float(largest) * layout.head_dim * layout.scaling / math.log(2.0)


class GroupAttention(torch.autograd.Function):
    """(x, weights, norms, prompt keys and values) -> (weighted values, new keys, new values)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w_q: Tensor,
        w_k: Tensor,
        w_v: Tensor,
        q_norm: Tensor,
        k_norm: Tensor,
        prompt_keys: Tensor | None,
        prompt_values: Tensor | None,
        layout: Layout,
    ) -> tuple[Tensor, Tensor, Tensor]:
        joined = join_weights(w_q, w_k, w_v, layout)
        made = project(x, joined, q_norm, k_norm, layout)
        bits = score_bits(q_norm, k_norm, layout)
        done = attend(
            made.queries, made.keys, made.values, prompt_keys, prompt_values, bits, layout
        )
        ctx.save_for_backward(
            x, joined, q_norm, k_norm, prompt_keys, prompt_values, made.queries, made.keys,
            made.values, made.normed, made.inverse_rms, done.out, done.prompt_weights,
            done.own_weights, done.inverse_sum,
        )  # fmt: skip
        ctx.layout = layout
        ctx.set_materialize_grads(False)
        return done.out.view(x.shape[0], -1), made.keys, made.values

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_out: Tensor | None, d_keys: Tensor | None, d_values: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        (
            x, joined, q_norm, k_norm, prompt_keys, prompt_values, queries, keys, values, normed,
            scale, out, prompt_weights, own_weights, inverse_sum,
        ) = ctx.saved_tensors  # fmt: skip
        layout = ctx.layout
        need = ctx.needs_input_grad
        if d_out is None:
            d_out = torch.zeros_like(out)
        done = Attended(out, prompt_weights, own_weights, inverse_sum)
        grads = attend_backward(
            d_out.view(out.shape), queries, keys, values, prompt_keys, prompt_values, done
        )
        new_keys = grads.keys if d_keys is None else grads.keys.add_(d_keys)
        new_values = grads.values if d_values is None else grads.values.add_(d_values)
        d_rows, d_q_norm, d_k_norm = project_backward(
            grads.queries, new_keys, new_values, (normed, scale), (q_norm, k_norm), layout
        )
        d_x = torch.mm(d_rows, joined) if need[0] else None
        d_q = d_k = d_v = None
        if any(need[1:4]):
            d_q, d_k, d_v = split_weight_gradient(torch.mm(d_rows.t(), x), layout)
        kept = (d_x, d_q, d_k, d_v, d_q_norm, d_k_norm, grads.prompt_keys, grads.prompt_values)
        return *(g if wanted else None for g, wanted in zip(kept, need, strict=False)), None


@dataclass(frozen=True)
class AttendGradients:
    """Gradients of `attend`'s inputs; that of the queries lacks its factor `scaling`."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    prompt_keys: Tensor | None
    prompt_values: Tensor | None


def attend_backward(
    d_out: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    prompt_keys: Tensor | None,
    prompt_values: Tensor | None,
    done: Attended,
) -> AttendGradients:
    """Gradients of `attend`, from d_out `[P, G, T, kv, r, D]`.

    With weights e_s = 2^score, Z their sum and g = d_out / Z: the gradient of a score in natural
    units is e_s (g . v_s - (d_out . out) / Z).
    """
    log2 = math.log(2.0)
    inverse = done.inverse_sum
    along = (d_out * done.out).sum(-1).permute(0, 3, 1, 4, 2) * inverse
    g = torch.empty_like(queries)
    torch.mul(d_out.permute(0, 3, 1, 4, 2, 5), inverse.unsqueeze(-1), out=g)

    own_g, own_q = g.flatten(3, 4).flatten(0, 2), queries.flatten(3, 4).flatten(0, 2)
    own_k, own_v = keys.flatten(0, 2), values.flatten(0, 2)
    along = along.contiguous()
    d_own = torch.bmm(own_g, own_v.transpose(1, 2))
    d_own.sub_(along.view(*own_g.shape[:2], 1)).mul_(done.own_weights)
    d_values = torch.bmm(done.own_weights.transpose(1, 2), own_g).view(values.shape)
    d_keys = torch.bmm(d_own.transpose(1, 2), own_q).mul_(log2).view(keys.shape)
    if prompt_keys is None or prompt_values is None or done.prompt_weights is None:
        d_queries = torch.bmm(d_own, own_k).view(queries.shape)
        return AttendGradients(d_queries, d_keys, d_values, None, None)

    shared_k, shared_v = prompt_keys.flatten(0, 1), prompt_values.flatten(0, 1)
    shared_g, shared_q = g.flatten(2, 4).flatten(0, 1), queries.flatten(2, 4).flatten(0, 1)
    d_shared = torch.bmm(shared_g, shared_v.transpose(1, 2))
    d_shared.sub_(along.view(*shared_g.shape[:2], 1)).mul_(done.prompt_weights)
    d_queries = torch.bmm(d_shared, shared_k)
    d_queries.view(own_q.shape).baddbmm_(d_own, own_k)
    return AttendGradients(
        d_queries.view(queries.shape),
        d_keys,
        d_values,
        torch.bmm(d_shared.transpose(1, 2), shared_q).mul_(log2).view(prompt_keys.shape),
        torch.bmm(done.prompt_weights.transpose(1, 2), shared_g).view(prompt_values.shape),
    )
