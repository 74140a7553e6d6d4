"""The model families that a small policy can belong to: transformers configs of equal sizes.

One function per family. Each keeps what makes its routing special (gate function, normalisation,
scaling, biases) and takes width, depth and experts from `ModelConfig`.
"""

from collections.abc import Callable
from typing import Any

from transformers import (
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from moe_rl.config import Family, ModelConfig


def family_config(config: ModelConfig, vocabulary: int) -> PreTrainedConfig:
    """The transformers config of `config.family` for a vocabulary of that many tokens."""
    return FAMILIES[config.family](config, vocabulary)


def _common(config: ModelConfig, vocabulary: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.expert_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_attention_heads,
        "num_experts_per_tok": config.experts_per_token,
        "max_position_embeddings": 1024,
        # Twice the usual 0.02: measured to shorten the cold start at width 96.
        "initializer_range": 0.04,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }


def _head_size(config: ModelConfig) -> int:
    return config.hidden_size // config.num_attention_heads


def _qwen3_moe(config: ModelConfig, vocabulary: int) -> PreTrainedConfig:
    """Softmax over all experts, the K largest normalised to 1 (arXiv 2505.09388)."""
    return Qwen3MoeConfig(
        **_common(config, vocabulary),
        head_dim=_head_size(config),
        moe_intermediate_size=config.expert_size,
        num_experts=config.num_experts,
        norm_topk_prob=True,
    )


def _olmoe(config: ModelConfig, vocabulary: int) -> PreTrainedConfig:
    """Softmax over all experts, the K largest not normalised (arXiv 2409.02060)."""
    return OlmoeConfig(
        **_common(config, vocabulary), num_experts=config.num_experts, norm_topk_prob=False
    )


def _mixtral(config: ModelConfig, vocabulary: int) -> PreTrainedConfig:
    """Softmax over the K largest logits (arXiv 2401.04088, section 2.1)."""
    return MixtralConfig(
        **_common(config, vocabulary),
        head_dim=_head_size(config),
        num_local_experts=config.num_experts,
        sliding_window=None,
    )


def _deepseek_v3(config: ModelConfig, vocabulary: int) -> PreTrainedConfig:
    """Sigmoid gates, normalised and scaled by 2.5, a shared expert, latent attention.

    arXiv 2412.19437, eq. 12-16, without groups; the correction bias stays 0, because the balancing
    that moves it belongs to pre-training.
    """
    head = _head_size(config)
    rotary = max(2, 2 * (head // 6))
    return DeepseekV3Config(
        **_common(config, vocabulary),
        moe_intermediate_size=config.expert_size,
        n_routed_experts=config.num_experts,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=0,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        kv_lora_rank=config.hidden_size // 2,
        q_lora_rank=None,
        qk_rope_head_dim=rotary,
        qk_nope_head_dim=head - rotary,
        v_head_dim=head,
    )


def _gpt_oss(config: ModelConfig, vocabulary: int) -> PreTrainedConfig:
    """Softmax over the K largest logits, biases in router and experts, attention sinks.

    Full attention in every layer: no response here is as long as the published sliding window.
    """
    return GptOssConfig(
        **_common(config, vocabulary),
        head_dim=_head_size(config),
        num_local_experts=config.num_experts,
        layer_types=["full_attention"] * config.num_layers,
        rope_parameters={"rope_type": "default", "rope_theta": 150000.0},
    )


FAMILIES: dict[Family, Callable[[ModelConfig, int], PreTrainedConfig]] = {
    "qwen3_moe": _qwen3_moe,
    "olmoe": _olmoe,
    "mixtral": _mixtral,
    "deepseek_v3": _deepseek_v3,
    "gpt_oss": _gpt_oss,
}
