"""The model families that a small policy can belong to: transformers configs of equal sizes."""

from typing import Any

from transformers import (
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from moe_rl.config import ModelConfig


def family_config(config: ModelConfig, vocabulary: int) -> PreTrainedConfig:
    """The transformers config of `config.family` for a vocabulary of that many tokens.

    Each family keeps what makes its routing special (gate function, normalisation, scaling, biases)
    and takes width, depth and experts from `config`.
    """
    experts, head = config.num_experts, config.hidden_size // config.num_attention_heads
    sizes: dict[str, Any] = {
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
    match config.family:
        case "qwen3_moe":  # softmax over all experts, the K largest normalised (arXiv 2505.09388)
            sizes |= {"moe_intermediate_size": config.expert_size, "head_dim": head}
            return Qwen3MoeConfig(**sizes, num_experts=experts, norm_topk_prob=True)
        case "olmoe":  # softmax over all experts, the K largest as they are (arXiv 2409.02060)
            return OlmoeConfig(**sizes, num_experts=experts, norm_topk_prob=False)
        case "mixtral":  # softmax over the K largest logits (arXiv 2401.04088, section 2.1)
            sizes |= {"head_dim": head, "sliding_window": None}
            return MixtralConfig(**sizes, num_local_experts=experts)
        case "deepseek_v3":
            # Sigmoid gates, normalised and scaled by 2.5, a shared expert, latent attention
            # (arXiv 2412.19437, eq. 12-16), without groups; the correction bias stays 0, because
            # the balancing that moves it belongs to pre-training.
            rotary = max(2, 2 * (head // 6))
            return DeepseekV3Config(
                **sizes,
                moe_intermediate_size=config.expert_size,
                n_routed_experts=experts,
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
        case "gpt_oss":
            # Softmax over the K largest logits, biases in router and experts, attention sinks. Full
            # attention in all layers: no response is as long as the published sliding window.
            return GptOssConfig(
                **sizes,
                head_dim=head,
                num_local_experts=experts,
                layer_types=["full_attention"] * config.num_layers,
                rope_parameters={"rope_type": "default", "rope_theta": 150000.0},
            )
