"""Replay check: every family of transformers with a router, as a small random model.

    model = build_family("deepseek_v3")

The formula of its gate weights is written here too, for `check.py` to hold its code against.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM

from moe_rl.routing.taps import NO_TOP_K


@dataclass(frozen=True, kw_only=True)
class Formula:
    """Gate weights `w [..., K]` of experts `ids [..., K]` from raw router logits `[..., E]`.

        r = score(temper * logits) over all E;  w = r[ids];  w /= sum(w) if normalised;  w *= scale;
        w /= K if averaged

    A string names the config's field. A softmax over the K chosen logits alone (GPT-OSS, Granite)
    is a normalised softmax.
    """

    score: str
    """softmax, sigmoid or sqrt_softplus."""
    normalise: bool | str = False
    scale: float | str = 1.0
    averaged: bool = False
    temper: float | str = 1.0

    def weights(self, logits: Tensor, ids: Tensor, config: Any) -> Tensor:
        """The formula in the type of `logits`, differentiable."""
        scores = {
            "softmax": lambda x: x.softmax(dim=-1),
            "sigmoid": torch.sigmoid,
            "sqrt_softplus": lambda x: nn.functional.softplus(x).sqrt(),
        }[self.score](logits * _number(self.temper, config))
        weights = scores.gather(-1, ids)
        if _number(self.normalise, config):
            weights = weights / weights.sum(dim=-1, keepdim=True)
        weights = weights * _number(self.scale, config)
        return weights / ids.shape[-1] if self.averaged else weights


def _number(value: float | str, config: Any) -> float:
    return float(getattr(config, value) if isinstance(value, str) else value)


# Sizes under every name that some config gives them; a config gets those it knows.
_SIZES: dict[int | None, str] = {
    # index_topk above the lengths of the checks: a choice of positions that jumps has no slope.
    64: "vocab_size max_position_embeddings vocab_size_per_layer_input index_topk",
    32: "hidden_size intermediate_size ffn_hidden_size intermediate_size_mlp "
    "dense_intermediate_size",
    16: "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size "
    "shared_intermediate_size moe_shared_expert_intermediate_size router_hidden_size "
    "head_dim linear_head_dim linear_key_head_dim linear_value_head_dim kv_channels "
    "kv_lora_rank q_lora_rank v_head_dim mamba_d_head mamba_head_dim index_head_dim "
    "indexer_head_dim",
    # Eight experts, two per token, four groups of two of which two are open.
    8: "num_experts num_local_experts n_routed_experts moe_num_experts "
    "qk_rope_head_dim qk_nope_head_dim mamba_d_state o_lora_rank indexer_budget",
    4: "n_group num_expert_group zero_expert_num "
    "mamba_n_heads mamba_d_conv mamba_num_heads indexer_compress_ratio",
    2: "num_experts_per_tok moe_k moe_topk moe_top_k top_k_experts topk_group "
    "num_hidden_layers num_layers num_attention_heads num_key_value_heads linear_num_heads "
    "linear_num_key_heads linear_num_value_heads mamba_expand index_n_heads indexer_n_heads "
    "o_groups",
    # Experts in every layer: one in every 1, none of the first 0 dense.
    1: "n_shared_experts num_shared_experts moe_num_shared_experts moe_layer_interval "
    "interleave_moe_layer_step mamba_n_groups indexer_kv_heads",
    0: "first_k_dense_replace num_dense_layers moe_layer_start_index hidden_size_per_layer_input",
    None: "pad_token_id bos_token_id eos_token_id",
}
SMALL: dict[str, Any] = {name: size for size, names in _SIZES.items() for name in names.split()}
SMALL["mlp_layer_types"] = ["sparse", "sparse"]

HYBRID = {"layer_types": ["linear_attention", "full_attention"]}

# The gate weights of each family; norm_topk_prob and the scales are fields of its config.
_FORMULAS: dict[Formula | None, str] = {
    Formula(score="softmax"): "jamba zaya",
    Formula(score="softmax", normalise=True): "aria_text cohere2_moe dbrx ernie4_5_moe gemma4_text "
    "gpt_oss granitemoe granitemoe_swa granitemoehybrid granitemoeshared hunyuan_v1_moe jetmoe "
    "minimax mixtral qwen3_5_moe_text qwen3_vl_moe_text",
    Formula(score="softmax", normalise="norm_topk_prob"): "flex_olmo mellum olmoe qwen2_moe "
    "qwen3_moe qwen3_next qwen4_exp_text",
    Formula(score="softmax", normalise=True, averaged=True): "openai_privacy_filter",
    Formula(score="softmax", scale="routed_scaling_factor"): "deepseek_v2 longcat_flash",
    Formula(score="softmax", normalise="norm_topk_prob", scale="routed_scaling_factor"): "mistral4",
    Formula(score="softmax", normalise=True, scale="routed_scaling_factor"): "mistral_large4_text",
    Formula(score="sigmoid"): "llama4_text",
    # The scale of minimax_m3_vl_text, and below that of beam, comes after the sum over experts.
    Formula(score="sigmoid", normalise=True): "afmoe laguna minimax_m2 minimax_m3_vl_text",
    Formula(score="sigmoid", normalise="norm_topk_prob"): "beam flint kolibri1",
    Formula(score="sigmoid", normalise=True, scale="router_scaling_factor"): "hy_v3",
    Formula(score="sigmoid", normalise=True, scale="routed_scaling_factor"): "inkling2_text",
    # DeepSeek-V3, arXiv 2412.19437, equations 13 to 16
    Formula(score="sigmoid", normalise="norm_topk_prob", scale="routed_scaling_factor"): "axk1 "
    "axk2 bailing_hybrid deepseek_v3 deepseek_v32 dots1 dots3_note_text exaone_moe glm4_moe "
    "glm4_moe_lite glm_moe_dsa hy_v4 kimi_linear lfm2_moe mimo_v2_flash nemotron_h solar_open",
    Formula(
        score="sigmoid",
        normalise=True,
        scale="routed_scaling_factor",
        temper="output_multiplier",
    ): "muse_spark_text",
    Formula(score="sqrt_softplus", normalise=True, scale="routed_scaling_factor"): "deepseek_v4",
    # Routed and shared experts are normalised together, so no formula of the K chosen alone.
    None: "inkling_text",
}

# Config fields of a family beyond `SMALL`.
_SETTINGS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(["bailing_hybrid", "granitemoehybrid", "kimi_linear"], HYBRID),
    **dict.fromkeys(["qwen3_5_moe_text", "qwen3_next", "qwen4_exp_text"], HYBRID),
    "dbrx": {
        **{"d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 64},
        # The class reads rope_theta and clips without asking; the defaults have neither.
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {
            **{"hidden_size": 32, "ffn_hidden_size": 16},
            **{"moe_num_experts": 8, "moe_top_k": 2},
        },
    },
    "deepseek_v2": {"topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0},
    # A hash of the token id chooses in the first layer: nothing to record, nothing to replay.
    "deepseek_v4": {"num_hidden_layers": 3, "mlp_layer_types": ["hash_moe", "moe", "moe"]},
    "flint": {"mlp_only_layers": []},
    "gemma4_text": {"enable_moe_block": True},
    "jamba": {
        **{"attn_layer_period": 2, "attn_layer_offset": 1},
        **{"expert_layer_period": 1, "expert_layer_offset": 0},
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {"moe_layers": [0, 1]},
    "longcat_flash": {"head_dim": 8},
    "mimo_v2_flash": {
        **{"num_attention_heads": 4, "sliding_window": 8},
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "nemotron_h": {"num_hidden_layers": 3, "layers_block_type": ["attention", "moe", "moe"]},
    "qwen3_moe": {"norm_topk_prob": True},
    "zaya": {"num_experts_per_tok": 1},
}

_FORMULA_OF = {name: formula for formula, names in _FORMULAS.items() for name in names.split()}
FAMILIES: dict[str, Formula | None] = {name: _FORMULA_OF[name] for name in sorted(_FORMULA_OF)}
"""The formula of the gate weights by family, None where there is none."""

REFUSED_UNBUILT = {"ernie4_5_vl_moe": NO_TOP_K["Ernie4_5_VLMoeMoeBlock"]}
"""Refused families that are not built here, for want of images, and why they are refused."""

REFUSED_FAMILIES: dict[str, dict[str, Any]] = {
    "doge": {"is_moe": True, "num_experts": 16},
    "nllb-moe": {
        **dict.fromkeys(("encoder_sparse_step", "decoder_sparse_step"), 1),
        **dict.fromkeys(("encoder_layers", "decoder_layers", "encoder_attention_heads"), 2),
        **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "d_model"), 16),
        **dict.fromkeys(("num_experts", "decoder_attention_heads"), 4),
        "pad_token_id": 1,
    },
    "phimoe": {},
    "switch_transformers": {
        **dict.fromkeys(("d_model", "d_ff"), 16),
        **dict.fromkeys(("num_layers", "num_sparse_encoder_layers"), 2),
        **dict.fromkeys(("d_kv", "num_heads", "num_experts"), 4),
    },
}


def family_names() -> list[str]:
    """Families of the installed transformers whose routing can be recorded and replayed."""
    return [name for name in FAMILIES if name in CONFIG_MAPPING]


def causal_families() -> list[str]:
    """Those of `family_names` that have a causal LM, which can be trained."""
    return [name for name in family_names() if _has_head(small_config(name))]


def _has_head(config: Any) -> bool:
    return type(config) in AutoModelForCausalLM._model_mapping


def formula_of(model_type: str) -> Formula | None:
    """The formula of a config's `model_type`; a multimodal wrapper has that of its text model."""
    return FAMILIES.get(model_type) or FAMILIES.get(f"{model_type}_text")


def small_config(name: str, **changes: Any) -> Any:
    """The small config of a family, changed by `changes`.

    Raises:
        ValueError: the installed transformers does not know the family.
    """
    known = f"{name}_text" if f"{name}_text" in FAMILIES else name
    if known not in CONFIG_MAPPING or known not in FAMILIES | REFUSED_FAMILIES:
        raise ValueError(
            f"family: {name!r} is not a Mixture-of-Experts family of the installed transformers. "
            f"Choose one of {', '.join(family_names())}."
        )
    config_class = CONFIG_MAPPING[known]
    fields = set(inspect.signature(config_class.__init__).parameters)
    fields |= set(getattr(config_class, "__dataclass_fields__", {}))
    small = {name: value for name, value in SMALL.items() if name in fields}
    settings = REFUSED_FAMILIES.get(known) or _SETTINGS.get(known, {})
    return AutoConfig.for_model(known, **{**small, **settings, **changes})


def build_family(name: str, *, seed: int = 0, **changes: Any) -> nn.Module:
    """A model of the family with random weights, in eval mode: 2 layers, 8 experts, 2 a token.

    A causal LM where the family has one, else the text model. Weights and correction biases are
    drawn wide, so that routing is spread over the experts and groups.

    Args:
        seed: seed of the weights; torch's global generator is left as it was.
        changes: config fields.

    Raises:
        ValueError: the installed transformers does not know the family.
    """
    config = small_config(name, **changes)
    kind = AutoModelForCausalLM if _has_head(config) else AutoModel
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = kind.from_config(config, attn_implementation="eager")
    drawn = {name for name, _ in model.named_parameters()}
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if not value.is_floating_point():
                continue
            # Other buffers are tables, as of the decay in linear attention: no weights.
            if "bias" in key or (value.ndim > 1 and key in drawn):
                value.normal_(0, 0.3, generator=generator)
    return model.eval()
