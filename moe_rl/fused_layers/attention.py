"""Stands in for Qwen3-MoE attention's `forward`: reads the call, runs `attention_math`."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from moe_rl.fused_layers.attention_math import (
    GroupAttention,
    Layout,
    attend,
    join_weights,
    project,
    score_bits,
)
from moe_rl.fused_layers.group_cache import GroupCache, GroupCacheLayer
from moe_rl.fused_layers.rms_norm import EXACT_DTYPES

# Scores are held whole; beyond this many positions stock SDPA's blockwise kernel is the better one.
_LONGEST_WITHOUT_CACHE = 512
# torch.bmm takes a slow loop for products of fewer multiplications than this.
_SMALLEST_FAST_PRODUCT = 400


def attention_forward(
    self: nn.Module,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of `[B, T, H]` with no cache or a `GroupCache`; anything else goes to stock code.

    Raises:
        ValueError: with a GroupCache: another batch than prompts times group size, a second
            continuation with gradients, a dtype other than float32 or float64, or a float mask.
    """
    cache = None
    if isinstance(past_key_values, GroupCache):
        cache = past_key_values.layers[self.layer_idx]
        _check(self, hidden_states, attention_mask, cache)
    elif (
        past_key_values is not None
        or hidden_states.shape[1] > _LONGEST_WITHOUT_CACHE
        or not _exact(self, hidden_states, attention_mask)
    ):
        return type(self).forward(
            self, hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
        )
    batch, length, _ = hidden_states.shape
    tensors = (
        hidden_states.reshape(batch * length, -1), self.q_proj.weight, self.k_proj.weight,
        self.v_proj.weight, self.q_norm.weight, self.k_norm.weight,
    )  # fmt: skip
    prompt = (None, None) if cache is None or cache.prompt is None else cache.prompt
    graph = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (*tensors, *prompt)
    )
    own_keys = length + (0 if cache is None else cache.response_length)
    multiplied = own_keys
    if not graph and prompt[0] is not None:
        rows = self.num_key_value_groups * length * self.head_dim
        multiplied = max(own_keys, math.ceil(_SMALLEST_FAST_PRODUCT / rows))
    layout = _layout(
        self, hidden_states, position_embeddings, attention_mask, cache, own_keys, multiplied
    )
    if graph:
        out = _with_gradients(tensors, prompt, layout, cache)
    else:
        out = _without_gradients(tensors, prompt, layout, cache, multiplied)
    return self.o_proj(out.view(batch, length, -1)), None


def _with_gradients(
    tensors: tuple[Tensor, ...],
    prompt: tuple[Tensor | None, Tensor | None],
    layout: Layout,
    cache: GroupCacheLayer | None,
) -> Tensor:
    if cache is not None and cache.response_length:
        raise ValueError(
            f"the cache holds {cache.response_length} response tokens already: with gradients a "
            "GroupCache takes one continuation; pass the whole response at once"
        )
    out, keys, values = GroupAttention.apply(*tensors, *prompt, layout)
    if cache is not None and cache.prompt is None:
        cache.set_prompt(keys.flatten(2, 3), values.flatten(2, 3))
    elif cache is not None:
        cache.hold(keys.detach(), values.detach())
    return out


def _without_gradients(
    tensors: tuple[Tensor, ...],
    prompt: tuple[Tensor | None, Tensor | None],
    layout: Layout,
    cache: GroupCacheLayer | None,
    multiplied: int,
) -> Tensor:
    x, w_q, w_k, w_v, q_norm, k_norm = tensors
    made = project(x, join_weights(w_q, w_k, w_v, layout), q_norm, k_norm, layout)
    keys, values = made.keys, made.values
    if cache is not None and cache.prompt is None:
        cache.set_prompt(keys.flatten(2, 3), values.flatten(2, 3))
    elif cache is not None:
        keys, values = cache.append(keys, values, multiplied)
    bits = score_bits(q_norm, k_norm, layout)
    return attend(made.queries, keys, values, *prompt, bits, layout).out


def _layout(
    attention: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None,
    cache: GroupCacheLayer | None,
    own_keys: int,
    multiplied: int,
) -> Layout:
    batch, length, _ = hidden_states.shape
    group = 1 if cache is None else cache.group_size
    grouped = (batch // group, 1, group, 1, length)
    own_mask, prompt_mask = _masks(
        attention_mask,
        grouped,
        prompt_keys=0 if cache is None else cache.prompt_length,
        own_keys=own_keys,
        multiplied=multiplied,
        like=hidden_states,
    )
    return Layout(
        prompts=batch // group,
        group=group,
        length=length,
        kv_heads=attention.k_proj.out_features // attention.head_dim,
        repeats=attention.num_key_value_groups,
        head_dim=attention.head_dim,
        scaling=attention.scaling,
        eps=attention.q_norm.variance_epsilon,
        turns=_turns(position_embeddings, grouped),
        own_mask=own_mask,
        prompt_mask=prompt_mask,
    )


def _turns(position_embeddings: tuple[Tensor, Tensor], grouped: tuple[int, ...]) -> Tensor:
    """cos + i sin of each pair. The tables repeat themselves in their second half."""
    cos, sin = position_embeddings
    half = cos.shape[-1] // 2
    turns = torch.complex(cos[..., :half].contiguous(), sin[..., :half].contiguous())
    return turns[0] if turns.shape[0] == 1 else turns.view(*grouped, half)


def _masks(
    mask: Tensor | None,
    grouped: tuple[int, ...],
    *,
    prompt_keys: int,
    own_keys: int,
    multiplied: int,
    like: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """(mask over the response's keys, mask over the prompt's) as factors, None where all are seen.

    `mask` is boolean `[B or 1, 1, T, prompt_keys + own_keys]`; None is causal. The first result
    has `multiplied` keys: those beyond `own_keys` are not filled yet.
    """
    length = grouped[-1]
    if mask is None:
        if length == 1 and multiplied == own_keys:
            return None, None
        ones = torch.ones(length, multiplied, dtype=like.dtype, device=like.device)
        return ones.tril_(own_keys - length), None
    if mask.shape[-1] != prompt_keys + own_keys:
        raise ValueError(
            f"attention_mask covers {mask.shape[-1]} keys, but there are {prompt_keys} in the "
            f"prompt and {own_keys} after it: pass one column a key"
        )
    # Without padding, transformers expands one mask over the batch.
    seen = mask[:1, 0] if mask.stride(0) == 0 else mask[:, 0]
    shape = grouped if seen.shape[0] > 1 else (length,)
    own = torch.zeros(*seen.shape[:2], multiplied, dtype=like.dtype, device=like.device)
    own[..., :own_keys] = seen[..., prompt_keys:]
    prompt = seen[..., :prompt_keys]
    prompt_mask = None if bool(prompt.all()) else prompt.to(like.dtype).view(*shape, -1)
    return own.view(*shape, -1), prompt_mask


def _check(attention: Any, hidden_states: Tensor, mask: Tensor | None, cache: Any) -> None:
    """Raise ValueError where a GroupCache cannot be served."""
    if not _exact(attention, hidden_states, mask):
        raise ValueError(
            f"a GroupCache needs float32 or float64 weights and input, sdpa attention, a boolean "
            f"mask, no autocast and no attention dropout; got {hidden_states.dtype} input, "
            f"{attention.config._attn_implementation} attention: pass a DynamicCache instead"
        )
    if cache.prompt is not None and hidden_states.shape[0] != cache.sequences:
        raise ValueError(
            f"batch of {hidden_states.shape[0]}, but the cache holds {cache.sequences} sequences "
            f"({cache.group_size} a prompt): pass one row a response, neighbours sharing a prompt"
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
