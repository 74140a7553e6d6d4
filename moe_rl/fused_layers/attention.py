"""Stands in for Qwen3-MoE attention's `forward`: reads the call, runs `group_attention`."""

from typing import Any

import torch
from torch import Tensor

from moe_rl.fused_layers.group_attention import (
    GroupAttention,
    Segment,
    attend,
    segments_of,
    spread_rows,
)
from moe_rl.fused_layers.group_cache import GroupCache, GroupCacheLayer
from moe_rl.fused_layers.heads import HeadShape, HeadWeights, Part, join_weights, lay_out, project
from moe_rl.fused_layers.one_pass import OnePass
from moe_rl.fused_layers.parts import cached_part, sequence_part
from moe_rl.fused_layers.rms_norm import EXACT_DTYPES

# Scores are held whole; beyond this many positions stock SDPA's blockwise kernel is the better one.
_LONGEST_WITHOUT_CACHE = 512


Weights = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Weights of the query, key and value projections and of the two head norms."""


def attention_forward(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None,
    past_key_values: Any = None,
    one_pass: OnePass | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of `[B, T, H]` with no cache or a `GroupCache`, or of the rows of a `OnePass`.

    Anything else goes to the class's own `forward`.

    Raises:
        ValueError: with a GroupCache or a OnePass: a dtype other than float32 or float64, a float
            mask, attention dropout; with a GroupCache: another batch than prompts times group
            size, or a second continuation with gradients.
    """
    cache = None
    fused_only = one_pass is not None or isinstance(past_key_values, GroupCache)
    if fused_only:
        _check(self, hidden_states, attention_mask)
    elif (
        past_key_values is not None
        or hidden_states.shape[1] > _LONGEST_WITHOUT_CACHE
        or not _exact(self, hidden_states, attention_mask)
    ):
        return type(self).forward(
            self, hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
        )
    shape = _shape(self)
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    weights = (
        self.q_proj.weight, self.k_proj.weight, self.v_proj.weight, self.q_norm.weight,
        self.k_norm.weight,
    )  # fmt: skip
    if fused_only and one_pass is None:
        cache = past_key_values.layers[self.layer_idx]
    prompt = (None, None) if cache is None or cache.prompt is None else cache.prompt
    graph = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, *weights, *prompt)
    )
    parts: tuple[Part, ...]
    if one_pass is not None:
        parts = one_pass.parts(position_embeddings, hidden_states)
    elif cache is None:
        parts = (sequence_part(position_embeddings, attention_mask, hidden_states),)
    else:
        _check_batch(cache, hidden_states, graph)
        part = cached_part(
            past_key_values, cache, position_embeddings, attention_mask, hidden_states,
            in_blocks=cache.prompt is not None and not graph,
        )  # fmt: skip
        parts = (part,)
    if graph:
        out, keys, values = GroupAttention.apply(x, *weights, *prompt, shape, parts)
        if cache is not None and cache.prompt is None:
            cache.set_prompt(keys.flatten(2, 3), values.flatten(2, 3))
        elif cache is not None:
            cache.hold(keys.detach(), values.detach())
    else:
        out = _without_gradients(x, weights, shape, parts, cache)
    return self.o_proj(out.view(*hidden_states.shape[:-1], -1)), None


def _without_gradients(
    x: Tensor,
    weights: Weights,
    shape: HeadShape,
    parts: tuple[Part, ...],
    cache: GroupCacheLayer | None,
) -> Tensor:
    joined = _joined(weights, shape, cache)
    made = project(x, joined, shape)
    out = x.new_empty(x.shape[0], shape.queries * shape.head_dim)
    prompt = None if cache is None else cache.prompt
    for part in parts:
        queries, keys, values = lay_out(made, part, shape)
        if cache is not None and prompt is not None:
            cache.append(keys, values)
            segments = _cached_segments(cache, part, prompt)
        else:
            segments = segments_of(part, keys, values, prompt)
        attend(queries, segments, joined.bits, spread_rows(out, part, shape))
        prompt = (keys.flatten(2, 3), values.flatten(2, 3))
        if cache is not None and cache.prompt is None:
            cache.set_prompt(*prompt)
    return out


def _cached_segments(
    cache: GroupCacheLayer, part: Part, prompt: tuple[Tensor, Tensor]
) -> list[Segment]:
    segments, start = [Segment(*prompt, part.prompt_mask)], 0
    for keys, values in cache.blocks:
        end = start + keys.shape[3]
        mask = None if part.own_mask is None else part.own_mask[..., start:end]
        segments.append(Segment(keys, values, mask))
        start = end
    return segments


def _joined(weights: Weights, shape: HeadShape, cache: GroupCacheLayer | None) -> HeadWeights:
    """The joined weights; with a cache, joined once for as long as nobody writes to them."""
    if cache is None or any(w.is_inference() for w in weights):
        return join_weights(*weights, shape)
    key = (*(w._version for w in weights), *weights)
    if cache.weights is None or any(a is not b for a, b in zip(cache.weights[0], key, strict=True)):
        cache.weights = (key, join_weights(*weights, shape))
    return cache.weights[1]


def _shape(attention: Any) -> HeadShape:
    return HeadShape(
        kv_heads=attention.k_proj.out_features // attention.head_dim,
        repeats=attention.num_key_value_groups,
        head_dim=attention.head_dim,
        scaling=attention.scaling,
        eps=attention.q_norm.variance_epsilon,
    )


def _exact(attention: Any, hidden_states: Tensor, mask: Tensor | None) -> bool:
    """Whether the fused maths is stock maths here."""
    return (
        hidden_states.dtype in EXACT_DTYPES
        and attention.q_proj.weight.dtype == hidden_states.dtype
        and attention.config._attn_implementation == "sdpa"
        and (mask is None or mask.dtype == torch.bool)
        and not (attention.training and attention.attention_dropout > 0)
        and not torch.is_autocast_enabled(hidden_states.device.type)
    )


def _check(attention: Any, hidden_states: Tensor, mask: Tensor | None) -> None:
    """Raise ValueError where stock maths is needed, but the call is one that only we can serve."""
    if not _exact(attention, hidden_states, mask):
        raise ValueError(
            f"GroupCache and one-pass reading need float32 or float64 weights and input, sdpa "
            f"attention, a boolean mask, no autocast and no attention dropout; got "
            f"{hidden_states.dtype} input, {attention.config._attn_implementation} attention: "
            "pass a DynamicCache instead"
        )


def _check_batch(cache: GroupCacheLayer, hidden_states: Tensor, graph: bool) -> None:
    if cache.prompt is not None and hidden_states.shape[0] != cache.sequences:
        raise ValueError(
            f"batch of {hidden_states.shape[0]}, but the cache holds {cache.sequences} sequences "
            f"({cache.group_size} a prompt): pass one row a response, neighbours sharing a prompt"
        )
    if graph and cache.response_length:
        raise ValueError(
            f"the cache holds {cache.response_length} response tokens already: with gradients a "
            "GroupCache takes one continuation; pass the whole response at once"
        )
