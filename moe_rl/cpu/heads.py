"""Attention heads from hidden states and back: projection, query and key norm, rotary.

    q, k = rotary(rms_norm(x W)),   v = x W_v

Rows of hidden states come in parts, each with its own arrangement (see `Part`): prompts, and the
responses to them. All rows share one projection; a part's queries are then laid out as
`[P, kv, G, r, T, D]` and its keys and values as `[P, kv, G, T, D]`: P prompts, G responses a
prompt, T positions, `kv` key-value heads, `r` query heads a key-value head, D head size.

Two reorderings save most of the passes over the data, with the same result up to rounding:

1. Query and key rows of the weights are permuted while the three matrices are joined, so that the
   two numbers that rotary turns together lie side by side: a rotation is one complex product, and
   it writes straight into the layout above. Scores do not notice, as queries and keys agree.
2. The query norm's weight carries the factor scaling / ln 2, so that the softmax can run in
   powers of two; its backward leaves out a factor ln 2, which the way back through rotary adds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from moe_rl.cpu.rms_norm import inverse_rms
from moe_rl.kernels.product import product, product_plus

LN2 = math.log(2.0)


class HeadShape(NamedTuple):
    """Sizes and constants of one attention module."""

    kv_heads: int
    repeats: int
    """Query heads that share a key-value head, r."""
    head_dim: int
    scaling: float
    eps: float

    @property
    def queries(self) -> int:
        """Query heads."""
        return self.kv_heads * self.repeats

    @property
    def row_counts(self) -> list[int]:
        """Rows of the three weights."""
        kv = self.kv_heads * self.head_dim
        return [self.repeats * kv, kv, kv]


@dataclass(frozen=True, kw_only=True)
class Part:
    """Consecutive rows of hidden states: P prompts times G responses times T positions."""

    start: int
    """First row."""
    prompts: int
    group: int
    length: int
    turns: Tensor
    """complex `[T, D / 2]` or `[P, 1, G, 1, T, D / 2]`: cos + i sin of every rotary pair."""
    own_mask: Tensor | None = None
    """1 or 0, broadcast to `[P, kv, G, r, T, keys]`: own keys a query sees; None: all."""
    prompt_mask: Tensor | None = None
    """The same for the keys of the shared prompt, for a part that follows one."""

    @property
    def rows(self) -> slice:
        """The part's rows."""
        return slice(self.start, self.start + self.prompts * self.group * self.length)

    @cached_property
    def turns_back(self) -> Tensor:
        """What turns gradients back, times ln 2, which the softmax's backward leaves out."""
        return (self.turns.conj() * LN2).resolve_conj()

    @cached_property
    def key_turns(self) -> Tensor:
        """`turns` without the axis of repeated query heads, which keys lack."""
        return self.turns if self.turns.dim() == 2 else self.turns.squeeze(3)

    @cached_property
    def key_turns_back(self) -> Tensor:
        """`turns_back` for keys."""
        back = self.turns_back
        return back if back.dim() == 2 else back.squeeze(3)


class HeadWeights(NamedTuple):
    """One attention module's weights as the fused code multiplies with them."""

    joined: Tensor
    """`[(queries + 2 kv) * D, H]`, rotary pairs of queries and keys side by side."""
    q_norm: Tensor
    """`[D]`, in the order of a joined head, times scaling / ln 2."""
    k_norm: Tensor
    """`[D]`, in the order of a joined head."""
    bits: float
    """Bound on |score| / ln 2: a normed head is at most sqrt(D) times its largest weight long."""


def join_weights(
    w_q: Tensor, w_k: Tensor, w_v: Tensor, q_norm: Tensor, k_norm: Tensor, shape: HeadShape
) -> HeadWeights:
    """Join and permute the weights of one attention module."""
    rows, pairs = _orders(shape)[:2]
    largest = math.prod(max(map(abs, weight.tolist())) for weight in (q_norm, k_norm))
    return HeadWeights(
        joined=torch.cat([w_q, w_k, w_v]).index_select(0, rows),
        q_norm=q_norm.index_select(0, pairs).mul_(shape.scaling / LN2),
        k_norm=k_norm.index_select(0, pairs),
        bits=largest * shape.head_dim * shape.scaling / LN2,
    )


def split_gradients(
    d_joined: Tensor | None, d_q_norm: Tensor, d_k_norm: Tensor, shape: HeadShape
) -> tuple[Tensor | None, ...]:
    """Gradients of `join_weights`' five weights from those of its three tensors."""
    _, _, rows_back, pairs_back = _orders(shape)
    d_q = d_k = d_v = None
    if d_joined is not None:
        d_q, d_k, d_v = d_joined.index_select(0, rows_back).split(shape.row_counts)
    d_q_norm = d_q_norm.index_select(0, pairs_back).mul_(shape.scaling / LN2)
    return d_q, d_k, d_v, d_q_norm, d_k_norm.index_select(0, pairs_back)


@lru_cache(maxsize=32)
def _orders(shape: HeadShape) -> tuple[Tensor, ...]:
    """(order of weight rows, order within a head, and the inverses of both).

    Within a query or key head, pair (i, i + D/2) goes to (2i, 2i + 1).
    """
    normed, d = shape.queries + shape.kv_heads, shape.head_dim
    pairs = torch.arange(d).view(2, -1).t().reshape(-1)
    heads = torch.arange(normed).unsqueeze(1) * d
    values = torch.arange(normed * d, (normed + shape.kv_heads) * d)
    rows = torch.cat([(heads + pairs).view(-1), values])
    return rows, pairs, torch.argsort(rows), torch.argsort(pairs)


class Normed(NamedTuple):
    """Query heads, or key heads, divided by their root mean square."""

    rows: Tensor
    """`[N, heads, D]`."""
    scale: Tensor
    """`[N, heads, 1]`: what they were multiplied with."""


class Projected(NamedTuple):
    """All rows after projection and norm, before they are laid out part by part."""

    queries: Normed
    keys: Normed
    values: Tensor
    """`[N, kv, D]`."""


def project(x: Tensor, joined: Tensor, shape: HeadShape) -> Projected:
    """Project x `[N, H]` by joined weights `[rows, H]`, and norm queries and keys.

    Three products rather than one: their contiguous results are normed twice as fast as slices.
    """
    q, k, v = (
        product(x, weight.t()).view(x.shape[0], -1, shape.head_dim)
        for weight in joined.split(shape.row_counts)
    )
    return Projected(_norm(q, shape.eps), _norm(k, shape.eps), v)


def _norm(raw: Tensor, eps: float) -> Normed:
    scale = inverse_rms(raw, eps)
    return Normed(raw * scale, scale)


def lay_out(
    made: Projected, weights: HeadWeights, parts: Sequence[Part], shape: HeadShape
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Each part's rotated queries (times scaling / ln 2), rotated keys, and values."""
    weighted_queries = made.queries.rows * weights.q_norm
    weighted_keys = made.keys.rows * weights.k_norm
    kv, d = shape.kv_heads, shape.head_dim
    laid = []
    for part in parts:
        p, g, t = size = (part.prompts, part.group, part.length)
        queries = weighted_queries.new_empty(p, kv, g, shape.repeats, t, d)
        keys = weighted_queries.new_empty(p, kv, g, t, d)
        from_queries = _spread_queries(weighted_queries[part.rows], size, shape)
        torch.mul(from_queries, part.turns, out=_as_pairs(queries))
        from_keys = _spread_keys(weighted_keys[part.rows], size)
        torch.mul(from_keys, part.key_turns, out=_as_pairs(keys))
        values = made.values[part.rows].view(*size, kv, d).permute(0, 3, 1, 2, 4).contiguous()
        laid.append((queries, keys, values))
    return laid


def _as_pairs(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.view(*x.shape[:-1], -1, 2))


def _spread_queries(rows: Tensor, size: tuple[int, int, int], shape: HeadShape) -> Tensor:
    """Complex view `[P, kv, G, r, T, D / 2]` of rows `[P * G * T, queries, D]`."""
    pairs = torch.view_as_complex(rows.view(*size, shape.kv_heads, shape.repeats, -1, 2))
    return pairs.permute(0, 3, 1, 4, 2, 5)


def _spread_keys(rows: Tensor, size: tuple[int, int, int]) -> Tensor:
    """Complex view `[P, kv, G, T, D / 2]` of rows `[P * G * T, kv, D]`."""
    pairs = torch.view_as_complex(rows.view(*size, rows.shape[1], -1, 2))
    return pairs.permute(0, 3, 1, 2, 4)


class LaidGradients(NamedTuple):
    """Gradients of one part's `lay_out`, those of queries and keys over ln 2."""

    part: Part
    queries: Tensor
    keys: Tensor
    values: Tensor


def lay_out_backward(
    grads: Sequence[LaidGradients],
    queries: Normed,
    keys: Normed,
    q_norm: Tensor,
    k_norm: Tensor,
    shape: HeadShape,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(gradients `[N, heads * D]` of the three products, gradients of both norms' weights)."""
    d_queries, d_keys = torch.empty_like(queries.rows), torch.empty_like(keys.rows)
    d_values = torch.empty_like(keys.rows)
    for part, turned_queries, turned_keys, values in grads:
        size = (part.prompts, part.group, part.length)
        spread = _spread_queries(d_queries[part.rows], size, shape)
        torch.mul(_as_pairs(turned_queries), part.turns_back, out=spread)
        spread = _spread_keys(d_keys[part.rows], size)
        torch.mul(_as_pairs(turned_keys), part.key_turns_back, out=spread)
        spread = d_values[part.rows].view(*size, *d_values.shape[1:])
        spread.permute(0, 3, 1, 2, 4).copy_(values)
    d_q_norm = _norm_backward(d_queries, queries, q_norm)
    d_k_norm = _norm_backward(d_keys, keys, k_norm)
    flat = (d_queries.flatten(1), d_keys.flatten(1), d_values.flatten(1))
    return flat, (d_q_norm, d_k_norm)


def _norm_backward(grad: Tensor, normed: Normed, weight: Tensor) -> Tensor:
    """Gradient of the weight. `grad` becomes that of the rows before the norm."""
    products = (grad * normed.rows).view(-1, weight.shape[0])
    along = torch.mv(products, weight).view(normed.scale.shape)
    grad.mul_(weight).addcmul_(normed.rows, along, value=-1.0 / weight.shape[0]).mul_(normed.scale)
    return products.sum(0)


def project_backward(
    d_products: tuple[Tensor, Tensor, Tensor], x: Tensor, joined: Tensor, shape: HeadShape
) -> Tensor:
    """Gradient of `joined`, `[rows, H]`."""
    return torch.cat([product(grad.t(), x) for grad in d_products])


def project_input_backward(
    d_products: tuple[Tensor, Tensor, Tensor], joined: Tensor, shape: HeadShape
) -> Tensor:
    """Gradient of x, `[N, H]`."""
    w_q, w_k, w_v = joined.split(shape.row_counts)
    d_q, d_k, d_v = d_products
    return product_plus(d_v, w_v, product_plus(d_k, w_k, product(d_q, w_q)))
