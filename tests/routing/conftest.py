"""Tiny models of the families whose routers differ in kind."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

BASE = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
LATENT = {  # DeepSeek attention
    "head_dim": 8,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "head_dim": 16,
        "moe_intermediate_size": 16,
        "num_experts": 8,
        "norm_topk_prob": True,
    },
    "olmoe": {"num_experts": 8},
    "mixtral": {"num_local_experts": 8},
    "gpt_oss": {"head_dim": 16, "num_local_experts": 8},
    "deepseek_v3": {**LATENT, "first_k_dense_replace": 0},
    "deepseek_v2": {
        **LATENT,
        "first_k_dense_replace": 0,
        "topk_method": "group_limited_greedy",
    },
    "llama4_text": {
        "head_dim": 16,
        "intermediate_size_mlp": 32,
        "num_local_experts": 8,
        "moe_layers": [0, 1],
        "interleave_moe_layer_step": 1,
    },
    "jetmoe": {"num_local_experts": 8, "kv_channels": 16},
    "qwen3": {"head_dim": 16},
    "phimoe": {"num_local_experts": 8},
    "doge": {"is_moe": True, "num_experts": 16},
}

Build = Callable[..., PreTrainedModel]


def build_model(family: str = "qwen3_moe", **changes: Any) -> PreTrainedModel:
    """A causal LM of `family` with weights large enough that routing is spread."""
    config = AutoConfig.for_model(family, **{**BASE, **FAMILIES[family], **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for name, value in model.state_dict().items():
        if value.is_floating_point() and (value.ndim > 1 or "correction" in name):
            value.normal_(0, 0.3)
    return model.eval()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def build() -> Build:
    return build_model


@pytest.fixture
def model() -> PreTrainedModel:
    return build_model()


@pytest.fixture
def tokens() -> Tensor:
    """Input ids `[B, S] = [4, 7]`."""
    return torch.randint(0, 32, (4, 7), generator=torch.Generator().manual_seed(1))
