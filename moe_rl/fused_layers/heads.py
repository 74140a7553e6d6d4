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
2. Queries carry the factor scaling / ln 2, so that the softmax can run in powers of two.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from moe_rl.fused_layers.rms_norm import inverse_rms

LN2 = math.log(2.0)


@dataclass(frozen=True, kw_only=True)
class HeadShape:
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
    def normed(self) -> int:
        """Heads that are normed and turned: queries and keys."""
        return self.queries + self.kv_heads


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

    @property
    def key_turns(self) -> Tensor:
        """`turns` without the axis of repeated query heads, which keys lack."""
        return self.turns if self.turns.dim() == 2 else self.turns.squeeze(3)


@dataclass(frozen=True)
class HeadWeights:
    """One module's weights as the fused code multiplies with them."""

    joined: Tensor
    """`[(queries + 2 kv) * D, H]`, rotary pairs of queries and keys side by side."""
    norms: Tensor
    """`[(queries + kv) * D]`: the norm weight of each normed head, in the same order."""
    bits: float
    """Bound on |score| / ln 2: a normed head is at most sqrt(D) times its largest weight long."""


def join_weights(
    w_q: Tensor, w_k: Tensor, w_v: Tensor, q_norm: Tensor, k_norm: Tensor, shape: HeadShape
) -> HeadWeights:
    """Join and permute the weights of one attention module."""
    rows, norm_rows = _orders(shape.queries, shape.kv_heads, shape.head_dim)[:2]
    largest = math.prod(max(map(abs, weight.tolist())) for weight in (q_norm, k_norm))
    return HeadWeights(
        joined=torch.cat([w_q, w_k, w_v]).index_select(0, rows),
        norms=torch.cat([q_norm, k_norm]).index_select(0, norm_rows),
        bits=largest * shape.head_dim * shape.scaling / LN2,
    )


def split_gradients(
    d_joined: Tensor | None, d_norms: Tensor, shape: HeadShape
) -> tuple[Tensor | None, ...]:
    """Gradients of `join_weights`' five inputs from those of its two tensors."""
    _, norm_rows, back = _orders(shape.queries, shape.kv_heads, shape.head_dim)
    d = shape.head_dim
    summed = d_norms.new_zeros(2 * d).index_add_(0, norm_rows, d_norms)
    d_q = d_k = d_v = None
    if d_joined is not None:
        sizes = [shape.queries * d, shape.kv_heads * d, shape.kv_heads * d]
        d_q, d_k, d_v = d_joined.index_select(0, back).split(sizes)
    return d_q, d_k, d_v, summed[:d], summed[d:]


@lru_cache(maxsize=32)
def _orders(queries: int, kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """(order of weight rows, index of each normed row's weight in [q_norm, k_norm], rows back).

    Within a query or key head, pair (i, i + D/2) goes to (2i, 2i + 1).
    """
    pairs = torch.arange(head_dim).view(2, -1).t().reshape(-1)
    heads = torch.arange(queries + kv_heads).unsqueeze(1)
    values = torch.arange(kv_heads * head_dim) + heads.numel() * head_dim
    rows = torch.cat([(heads * head_dim + pairs).view(-1), values])
    norm_rows = ((heads >= queries) * head_dim + pairs).view(-1)
    return rows, norm_rows, torch.argsort(rows)


@dataclass(frozen=True)
class Projected:
    """All rows after projection and norm, before they are laid out part by part."""

    weighted: Tensor
    """`[N, normed heads, D]`: normed, times the norm weights."""
    values: Tensor
    """`[N, kv, D]`."""
    normed: Tensor
    """`[N, normed heads, D]`: divided by each head's root mean square."""
    scale: Tensor
    """`[N, normed heads, 1]`: what divided them, inverted."""


def project(x: Tensor, weights: HeadWeights, shape: HeadShape) -> Projected:
    """Project x `[N, H]` and norm its queries and keys."""
    out = torch.mm(x, weights.joined.t()).view(x.shape[0], -1, shape.head_dim)
    raw, values = out[:, : shape.normed], out[:, shape.normed :]
    scale = inverse_rms(raw, shape.eps)
    normed = raw * scale
    return Projected(normed * weights.norms.view(raw.shape[1:]), values, normed, scale)


def lay_out(made: Projected, part: Part, shape: HeadShape) -> tuple[Tensor, Tensor, Tensor]:
    """A part's rotated queries (times scaling / ln 2), rotated keys, and values."""
    size = (part.prompts, part.group, part.length)
    kv, r, d = shape.kv_heads, shape.repeats, shape.head_dim
    weighted = made.weighted
    queries = weighted.new_empty(part.prompts, kv, part.group, r, part.length, d)
    keys = weighted.new_empty(part.prompts, kv, part.group, part.length, d)
    pairs = _as_pairs(weighted[part.rows]).view(*size, -1, d // 2)
    torch.mul(
        pairs[..., : shape.queries, :].view(*size, kv, r, -1).permute(0, 3, 1, 4, 2, 5),
        part.turns * (shape.scaling / LN2),
        out=_as_pairs(queries),
    )
    torch.mul(
        pairs[..., shape.queries :, :].permute(0, 3, 1, 2, 4), part.key_turns, out=_as_pairs(keys)
    )
    values = made.values[part.rows].view(*size, kv, d).permute(0, 3, 1, 2, 4).contiguous()
    return queries, keys, values


def _as_pairs(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.view(*x.shape[:-1], -1, 2))


def project_backward(
    d_parts: Sequence[tuple[Part, Tensor, Tensor, Tensor]],
    normed: Tensor,
    scale: Tensor,
    norms: Tensor,
    shape: HeadShape,
) -> tuple[Tensor, Tensor]:
    """(gradient of the product with the joined weights `[N, rows]`, gradient of `norms`).

    `d_parts` holds, for each part, the gradients of rotated queries, rotated keys, and values.
    That of the queries is taken with respect to queries without the factor scaling / ln 2, and
    still lacks the factor `scaling`, which is applied here.
    """
    kv, r, d = shape.kv_heads, shape.repeats, shape.head_dim
    grad = torch.empty_like(normed)
    out = grad.new_empty(normed.shape[0], shape.normed + kv, d)
    for part, d_queries, d_keys, d_values in d_parts:
        size = (part.prompts, part.group, part.length)
        pairs = _as_pairs(grad[part.rows]).view(*size, -1, d // 2)
        torch.mul(
            _as_pairs(d_queries),
            (part.turns * shape.scaling).conj().resolve_conj(),
            out=pairs[..., : shape.queries, :].view(*size, kv, r, -1).permute(0, 3, 1, 4, 2, 5),
        )
        torch.mul(
            _as_pairs(d_keys),
            part.key_turns.conj().resolve_conj(),
            out=pairs[..., shape.queries :, :].permute(0, 3, 1, 2, 4),
        )
        d_raw_values = out[part.rows, shape.normed :].view(*size, kv, d)
        d_raw_values.permute(0, 3, 1, 2, 4).copy_(d_values)
    products = grad * normed
    d_norms = products.sum(0).view(-1)
    along = (products * norms.view(normed.shape[1:])).sum(-1, keepdim=True)
    grad.mul_(norms.view(normed.shape[1:])).addcmul_(normed, along, value=-1.0 / d)
    torch.mul(grad, scale, out=out[:, : shape.normed])
    return out.view(normed.shape[0], -1), d_norms
