"""Softmax attention of grouped responses, forward and backward, on plain tensors.

    out_t = sum_s softmax_s(q_t . k_s * scaling) v_s,     s over the prompt, then over the response

A query of response g to prompt p sees keys in segments: the prompt's, shared by the G responses,
and the response's own. Shapes as in `heads`; queries `[P, kv, G, r, T, D]` are read without a copy
as `[P * kv, G * r * T, D]` against shared keys `[P, kv, S, D]`, and as `[P * kv * G, r * T, D]`
against own keys `[P, kv, G, S, D]`. So a prompt is attended once for all its responses: no G-fold
copy of its keys, and one large product where G small ones were.

The softmax runs in powers of two and divides at the end, on D numbers a query instead of a row of
scores. Its maximum is subtracted only where the norms' weights allow scores that could overflow.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe_rl.cpu.heads import HeadShape, Part

# 2^60 squared stays far from float32's 2^127, also when summed over a context.
_SAFE_BITS = 60.0


class Segment(NamedTuple):
    """Keys that queries attend to: shared `[P, kv, S, D]`, or each response's own with a G axis."""

    keys: Tensor
    values: Tensor
    mask: Tensor | None
    """1 or 0, broadcast to `[P, kv, G, r, T, S]`; None: all are seen."""

    def fold(self, queries: Tensor) -> Tensor:
        """Queries, or anything of their shape but the last axis, as a batch that meets the keys."""
        batch = self.keys.shape[:-2].numel()
        return queries.view(batch, -1, queries.shape[-1])


def attend(
    queries: Tensor, segments: Sequence[Segment], bits: float, out: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Softmax attention over all segments, written to `out` `[P, G, T, kv, r, D]`.

    Returns:
        The weights of each segment before division, 2^score or 0 where masked, `[..., S]` in the
        segment's folding; and 1 / their sum, `[P, kv, G, r, T, 1]`. A query that sees no key gets
        a result of 0.
    """
    rows = queries.shape[:-1]
    weights = [torch.bmm(s.fold(queries), _matrices(s.keys).transpose(1, 2)) for s in segments]
    views = [weight.view(*rows, -1) for weight in weights]
    if bits > _SAFE_BITS:
        _subtract_maximum(views, segments)
    total = None
    for view, segment in zip(views, segments, strict=True):
        view.exp2_()
        if segment.mask is not None:
            view.mul_(segment.mask)
        part = view.sum(-1, keepdim=True)
        total = part if total is None else total.add_(part)
    assert total is not None
    inverse = total.clamp_(min=torch.finfo(total.dtype).tiny).reciprocal_()
    summed = _sum_of_products(weights, [_matrices(s.values) for s in segments])
    torch.mul(summed.view(queries.shape), inverse, out=out.permute(0, 3, 1, 4, 2, 5))
    return weights, inverse


def attend_backward(
    d_out: Tensor,
    out: Tensor,
    queries: Tensor,
    segments: Sequence[Segment],
    weights: Sequence[Tensor],
    inverse: Tensor,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """(gradient of the queries, gradients of each segment's keys and values).

    With weights e_s, their sum Z and g = d_out / Z, the gradient of a score s (in bits) is
    ln 2 e_s (g . v_s - (d_out . out) / Z). The factor ln 2 is left out, so that the gradients of
    queries and keys are those over ln 2.
    """
    along = (d_out * out).sum(-1, keepdim=True).permute(0, 3, 1, 4, 2, 5) * inverse
    g = torch.empty_like(queries)
    torch.mul(d_out.permute(0, 3, 1, 4, 2, 5), inverse, out=g)
    along = along.contiguous()
    d_scores, d_segments = [], []
    for segment, weight in zip(segments, weights, strict=True):
        folded_g = segment.fold(g)
        d_score = torch.bmm(folded_g, _matrices(segment.values).transpose(1, 2))
        d_score.sub_(segment.fold(along)).mul_(weight)
        d_keys = torch.bmm(d_score.transpose(1, 2), segment.fold(queries))
        d_values = torch.bmm(weight.transpose(1, 2), folded_g)
        d_scores.append(d_score)
        d_segments.append((d_keys.view_as(segment.keys), d_values.view_as(segment.values)))
    d_queries = _sum_of_products(d_scores, [_matrices(s.keys) for s in segments])
    return d_queries.view(queries.shape), d_segments


def _matrices(x: Tensor) -> Tensor:
    return x.flatten(0, -3)


def _sum_of_products(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Sum over segments of left @ right, in each segment's own folding of one batch of rows."""
    total = torch.bmm(left[0], right[0])
    for a, b in zip(left[1:], right[1:], strict=True):
        total.view(*a.shape[:2], -1).baddbmm_(a, b)
    return total


def _subtract_maximum(scores: Sequence[Tensor], segments: Sequence[Segment]) -> None:
    for score, segment in zip(scores, segments, strict=True):
        if segment.mask is not None:
            score.masked_fill_(segment.mask == 0, -math.inf)
    maximum = torch.stack([score.amax(-1, keepdim=True) for score in scores]).amax(0)
    # A query that sees no key has the maximum -inf, and -inf - (-inf) is not a number.
    maximum.clamp_(min=torch.finfo(maximum.dtype).min)
    for score in scores:
        score.sub_(maximum)


def segments_of(
    part: Part, keys: Tensor, values: Tensor, prompt: tuple[Tensor, Tensor] | None
) -> list[Segment]:
    """A part's own segment, and that of the prompts it follows."""
    own = Segment(keys, values, part.own_mask)
    return [own] if prompt is None else [own, Segment(*prompt, part.prompt_mask)]


def spread_rows(rows: Tensor, part: Part, shape: HeadShape) -> Tensor:
    """A part's rows of `[N, queries * D]` as `[P, G, T, kv, r, D]`."""
    sizes = (
        part.prompts,
        part.group,
        part.length,
        shape.kv_heads,
        shape.repeats,
        shape.head_dim,
    )
    return rows[part.rows].view(sizes)
