"""Reading prompts and responses with a fused model: its cache, or one pass over both."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeAttention

from moe_rl.cpu.attention import attention_forward, runs
from moe_rl.cpu.group_cache import GroupCache
from moe_rl.cpu.one_pass import OnePass


def attention_is_fused(model: Any) -> bool:
    """Whether every attention layer of the model runs the fused code (and there is one)."""
    layers = [m for m in model.modules() if isinstance(m, Qwen3MoeAttention)]
    # A model of several families' layers must not be read by code that knows one of them.
    counted = model.config.get_text_config(decoder=True).num_hidden_layers
    return len(layers) == counted and all(runs(layer, attention_forward) for layer in layers)


def new_cache(model: Any) -> GroupCache | DynamicCache:
    """An empty key-value cache: `GroupCache` where every attention is fused, else `DynamicCache`.

    Both take `batch_repeat_interleave(G)` after the prompts were read.
    """
    if attention_is_fused(model):
        return GroupCache(model.config.num_hidden_layers)
    return DynamicCache(config=model.config)


def read_in_one_pass(
    model: Any,
    prompt_ids: Tensor,
    response_ids: Tensor,
    prompt_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Hidden states of prompts and responses from one forward pass, with gradients.

    The model sees one sequence of batch 1: first the rows of all prompts, then those of all
    responses. Routers therefore see `[P * Sp + B * T]` tokens in that order, and a record or a
    replay of their choices has those positions.

    Args:
        model: a causal LM whose attention `use_fused_layers` has swapped.
        prompt_ids: int64 `[P, Sp]`, left padded.
        response_ids: int64 `[B, T]`, B = P * G, the responses to one prompt being neighbours.
        prompt_mask: bool `[P, Sp]`, False on padding; None where there is none.

    Returns:
        Last hidden states `[P, Sp, H]` and `[B, T, H]`.

    Raises:
        ValueError: a batch that is no multiple of the prompts, or attention that is not fused.
    """
    if not attention_is_fused(model):
        raise ValueError(
            f"model: the attention of {type(model).__name__} is not fused, so it cannot tell the "
            "rows of one pass apart: call use_fused_layers(model) first, or read with a cache"
        )
    prompts, prompt_length = prompt_ids.shape
    batch, length = response_ids.shape
    if batch % prompts:
        raise ValueError(
            f"response_ids has {batch} rows for {prompts} prompts: pass the same number of "
            "responses to every prompt"
        )
    rows = OnePass(
        prompts=prompts,
        prompt_length=prompt_length,
        group=batch // prompts,
        length=length,
        prompt_mask=prompt_mask,
    )
    ids = torch.cat([prompt_ids.reshape(-1), response_ids.reshape(-1)]).unsqueeze(0)
    hidden = model.base_model(
        input_ids=ids,
        position_ids=rows.position_ids(),
        # Four axes: transformers takes it for a finished mask and builds none. `OnePass` masks.
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device),
        use_cache=False,
        one_pass=rows,
    ).last_hidden_state[0]
    split = rows.prompt_rows
    return hidden[:split].view(prompts, prompt_length, -1), hidden[split:].view(batch, length, -1)
