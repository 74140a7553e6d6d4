"""The Triton kernel of `routing_statistics`: one read of the router logits.

A program takes a few tokens with all their experts in registers, and finds the K + 1 largest logits
by K + 1 maxima: K is 8 or so, and a sort of E would do more. Shapes: T tokens, E experts, K experts
per token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_rl.kernels.routing_stats import RoutingStatistics

TOKENS = 16
"""Tokens of a program: with E = 128 a tile is 8 KiB of registers over 4 warps."""


def triton_routing(logits: Tensor, ids: Tensor) -> RoutingStatistics:
    """`routing_statistics` of `[T, E]` logits and `[T, K]` ids on a GPU or in the interpreter."""
    num_tokens, num_experts = logits.shape
    top_k = ids.shape[1]
    # The interpreter's bfloat16 is not to be trusted; the widened copy is E numbers a token.
    logits = logits.float().contiguous()
    # An id beyond int32 would come out as another expert; 8 bits hold no -1, or not every E.
    ids = ids.long().clamp(-1, num_experts).to(torch.int32).contiguous()
    live = torch.empty_like(ids, dtype=torch.int16)
    weights = logits.new_empty(num_tokens, top_k)
    churn, margin, entropy = logits.new_empty(3, num_tokens)
    if num_tokens:
        _routing_kernel[(triton.cdiv(num_tokens, TOKENS),)](
            *(logits, ids, live, churn, margin, entropy, weights, num_tokens),
            *(num_experts, top_k, TOKENS, triton.next_power_of_2(num_experts)),
        )
    return RoutingStatistics(live, churn, margin, entropy, weights)


@triton.jit
def _routing_kernel(  # type: ignore[no-untyped-def]
    logits,
    ids,
    live,
    churn,
    margin,
    entropy,
    weights,
    num_tokens,
    E: tl.constexpr,
    K: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    inside = rows < num_tokens
    experts = tl.arange(0, WIDTH)[None, :]
    real = experts < E
    x = tl.load(logits + rows[:, None] * E + experts, mask=inside[:, None] & real, other=0.0)
    broken = tl.max(((x != x) & real).to(tl.int32), axis=1) > 0
    x = tl.where(real, x, float("-inf"))
    top = tl.max(x, axis=1)
    # An expert that cannot be chosen has -inf, and 0 * -inf would be NaN; a NaN must stay one.
    shifted = tl.maximum(x - top[:, None], -1e4, propagate_nan=tl.PropagateNan.ALL)
    r = tl.where(real, tl.exp(shifted), 0.0)
    total = tl.sum(r, axis=1)
    tl.store(entropy + rows, tl.log(total) - tl.sum(r * shifted, axis=1) / total, mask=inside)
    recorded = inside
    for k in tl.static_range(K):
        recorded &= tl.load(ids + rows * K + k, mask=inside, other=-1) >= 0
    chosen = tl.zeros((TOKENS, WIDTH), dtype=tl.int32)
    listed = tl.zeros((TOKENS, WIDTH), dtype=tl.int32)
    last = top
    # Lifted off -inf, which marks those that are gone: of equals argmax would take one of them.
    left = tl.where(real, tl.maximum(x, -3.4028234663852886e38), float("-inf"))
    for k in tl.static_range(K):
        best = tl.argmax(left, axis=1)
        here = experts == best[:, None]
        last = tl.max(tl.where(here, x, float("-inf")), axis=1)
        chosen += here.to(tl.int32)
        left = tl.where(here, float("-inf"), left)
        tl.store(live + rows * K + k, best.to(tl.int16), mask=inside)
        mine = tl.load(ids + rows * K + k, mask=inside, other=-1)
        listed = tl.where(experts == mine[:, None], 1, listed)
        used = tl.where(recorded, mine, best.to(tl.int32))
        weight = tl.sum(tl.where(experts == used[:, None], r, 0.0), axis=1) / total
        tl.store(weights + rows * K + k, weight, mask=inside)
    if K == E:
        gap = tl.full((TOKENS,), float("inf"), dtype=tl.float32)
    else:
        following = experts == tl.argmax(left, axis=1)[:, None]
        gap = last - tl.max(tl.where(following, x, float("-inf")), axis=1)
    tl.store(margin + rows, tl.where(broken, float("nan"), gap), mask=inside)
    share = (K - tl.sum(chosen * listed, axis=1)).to(tl.float32) / K
    tl.store(churn + rows, tl.where(recorded, share, float("nan")), mask=inside)
