"""From a call of an attention module to `Part`: rotary tables and masks of grouped rows."""

import torch
from torch import Tensor

from moe_rl.cpu.group_cache import GroupCache, GroupCacheLayer
from moe_rl.cpu.heads import Part

PositionEmbeddings = tuple[Tensor, Tensor]
"""cos and sin `[1 or B, T, D]`, whose second half along D repeats the first."""


def sequence_part(positions: PositionEmbeddings, mask: Tensor | None, hidden: Tensor) -> Part:
    """Whole sequences `[B, T, H]`, each a prompt of its own."""
    batch, length, _ = hidden.shape
    grouped = (batch, 1, 1, 1, length)
    return Part(
        start=0,
        prompts=batch,
        group=1,
        length=length,
        turns=turns_of(positions, grouped),
        own_mask=_masks(mask, grouped, 0, length, length, hidden)[0],
    )


def cached_part(
    cache: GroupCache,
    layer: GroupCacheLayer,
    positions: PositionEmbeddings,
    mask: Tensor | None,
    hidden: Tensor,
    *,
    in_blocks: bool,
) -> Part:
    """The next positions of a `GroupCache`. Layers of one forward share what is computed here.

    `in_blocks`: the new keys go to the cache's blocks, so masks cover the blocks' empty positions.
    """
    key = (positions[0], mask)
    if cache.shared is not None and all(a is b for a, b in zip(cache.shared[0], key, strict=True)):
        return cache.shared[1]
    batch, length, _ = hidden.shape
    group = layer.group_size
    grouped = (batch // group, 1, group, 1, length)
    own_keys = layer.response_length + length
    capacity = layer.capacity_for(length) if in_blocks else own_keys
    own_mask, prompt_mask = _masks(mask, grouped, layer.prompt_length, own_keys, capacity, hidden)
    part = Part(
        start=0,
        prompts=batch // group,
        group=group,
        length=length,
        turns=turns_of(positions, grouped),
        own_mask=own_mask,
        prompt_mask=prompt_mask,
    )
    cache.shared = (key, part)
    return part


def turns_of(positions: PositionEmbeddings, grouped: tuple[int, ...]) -> Tensor:
    """cos + i sin of each rotary pair: `[T, D / 2]`, or `[P, 1, G, 1, T, D / 2]` if rows differ."""
    cos, sin = positions
    half = cos.shape[-1] // 2
    turns = torch.complex(cos[..., :half].contiguous(), sin[..., :half].contiguous())
    return turns[0] if turns.shape[0] == 1 else turns.view(*grouped, half)


def causal(length: int, keys: int, capacity: int, like: Tensor) -> Tensor | None:
    """1 where one of the last `length` of `keys` positions sees a key, else 0; `[T, capacity]`."""
    if length == 1 and keys == capacity:
        return None
    ones = torch.ones(length, capacity, dtype=like.dtype, device=like.device)
    return ones.tril_(keys - length)


def _masks(
    mask: Tensor | None,
    grouped: tuple[int, ...],
    prompt_keys: int,
    own_keys: int,
    capacity: int,
    like: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """(mask over own keys, mask over the prompt's) as factors 1 and 0; None where all are seen.

    `mask` is boolean `[B or 1, 1, T, prompt_keys + own_keys]`; None is causal. The own mask has
    `capacity` columns.
    """
    length = grouped[-1]
    if mask is None:
        return causal(length, own_keys, capacity, like), None
    assert mask.shape[-1] == prompt_keys + own_keys, (mask.shape, prompt_keys, own_keys)
    # Without padding, transformers expands one mask over the batch.
    seen = mask[:1, 0] if mask.stride(0) == 0 else mask[:, 0]
    shape = grouped if seen.shape[0] > 1 else (length,)
    own = torch.zeros(*seen.shape[:2], capacity, dtype=like.dtype, device=like.device)
    own[..., :own_keys] = seen[..., prompt_keys:]
    prompt = seen[..., :prompt_keys]
    prompt_mask = None if bool(prompt.all()) else prompt.to(like.dtype).view(*shape, -1)
    return own.view(*shape, -1), prompt_mask
