"""Replay check: every family of transformers with a router, as a small random model.

    model = build_family("deepseek_v3")

What a family is checked against is written here too: the formula of its gate weights, which
`check.py` evaluates by itself and compares.
"""

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM

from moe_rl.replay_check.gate_formula import Formula
from moe_rl.routing.taps import REFUSED

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


@dataclass(frozen=True, kw_only=True)
class FamilyEntry:
    """How to build a small model of a family, and what its router computes."""

    formula: Formula | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    """Config fields beyond `SMALL`."""


def _family(formula: Formula | None, **settings: Any) -> FamilyEntry:
    return FamilyEntry(formula=formula, settings=settings)


_SOFTMAX = Formula(score="softmax")
_NORMED = Formula(score="softmax", normalise=True)
_SWITCHED = Formula(score="softmax", normalise="norm_topk_prob")
_SIGMOID = Formula(score="sigmoid", normalise=True)
_SIGMOID_SWITCHED = Formula(score="sigmoid", normalise="norm_topk_prob")
_DEEPSEEK = Formula(
    score="sigmoid", normalise="norm_topk_prob", scale="routed_scaling_factor"
)  # DeepSeek-V3, arXiv 2412.19437, equations 13 to 16

FAMILIES: dict[str, FamilyEntry] = {
    "afmoe": _family(_SIGMOID),
    "aria_text": _family(_NORMED),
    "axk1": _family(_DEEPSEEK),
    "axk2": _family(_DEEPSEEK),
    "bailing_hybrid": _family(_DEEPSEEK, **HYBRID),
    "beam": _family(_SIGMOID_SWITCHED),  # the scale comes after the sum over experts
    "cohere2_moe": _family(_NORMED),
    "dbrx": _family(
        _NORMED,
        d_model=32,
        n_heads=2,
        n_layers=2,
        max_seq_len=64,
        # The class reads rope_theta and clips without asking; the defaults have neither.
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        ffn_config={
            "hidden_size": 32,
            "ffn_hidden_size": 16,
            "moe_num_experts": 8,
            "moe_top_k": 2,
        },
    ),
    "deepseek_v2": _family(
        Formula(score="softmax", scale="routed_scaling_factor"),
        topk_method="group_limited_greedy",
        routed_scaling_factor=16.0,
    ),
    "deepseek_v3": _family(_DEEPSEEK),
    "deepseek_v32": _family(_DEEPSEEK),
    "deepseek_v4": _family(
        Formula(score="sqrt_softplus", normalise=True, scale="routed_scaling_factor"),
        num_hidden_layers=3,
        # A hash of the token id chooses in the first: nothing to record, nothing to replay.
        mlp_layer_types=["hash_moe", "moe", "moe"],
    ),
    "dots1": _family(_DEEPSEEK),
    "dots3_note_text": _family(_DEEPSEEK),
    "ernie4_5_moe": _family(_NORMED),
    "exaone_moe": _family(_DEEPSEEK),
    "flex_olmo": _family(_SWITCHED),
    "flint": _family(_SIGMOID_SWITCHED, mlp_only_layers=[]),
    "gemma4_text": _family(_NORMED, enable_moe_block=True),
    "glm4_moe": _family(_DEEPSEEK),
    "glm4_moe_lite": _family(_DEEPSEEK),
    "glm_moe_dsa": _family(_DEEPSEEK),
    "gpt_oss": _family(_NORMED),
    "granitemoe": _family(_NORMED),
    "granitemoe_swa": _family(_NORMED),
    "granitemoehybrid": _family(_NORMED, **HYBRID),
    "granitemoeshared": _family(_NORMED),
    "hunyuan_v1_moe": _family(_NORMED),
    "hy_v3": _family(Formula(score="sigmoid", normalise=True, scale="router_scaling_factor")),
    "hy_v4": _family(_DEEPSEEK),
    # Routed and shared experts are normalised together, so no formula of the K chosen alone.
    "inkling_text": _family(None),
    "inkling2_text": _family(
        Formula(score="sigmoid", normalise=True, scale="routed_scaling_factor")
    ),
    "jamba": _family(
        _SOFTMAX,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=1,
        expert_layer_offset=0,
    ),
    "jetmoe": _family(_NORMED),
    "kimi_linear": _family(_DEEPSEEK, **HYBRID),
    "kolibri1": _family(_SIGMOID_SWITCHED),
    "laguna": _family(_SIGMOID),
    "lfm2_moe": _family(_DEEPSEEK, layer_types=["conv", "full_attention"]),
    "llama4_text": _family(Formula(score="sigmoid"), moe_layers=[0, 1]),
    "longcat_flash": _family(Formula(score="softmax", scale="routed_scaling_factor"), head_dim=8),
    "mellum": _family(_SWITCHED),
    "mimo_v2_flash": _family(
        _DEEPSEEK,
        num_attention_heads=4,
        layer_types=["full_attention", "sliding_attention"],
        sliding_window=8,
    ),
    "minimax": _family(_NORMED),
    "minimax_m2": _family(_SIGMOID),
    "minimax_m3_vl_text": _family(_SIGMOID),  # the scale comes after the sum over experts
    "mistral4": _family(
        Formula(score="softmax", normalise="norm_topk_prob", scale="routed_scaling_factor")
    ),
    "mistral_large4_text": _family(
        Formula(score="softmax", normalise=True, scale="routed_scaling_factor")
    ),
    "mixtral": _family(_NORMED),
    "muse_spark_text": _family(
        Formula(
            score="sigmoid",
            normalise=True,
            scale="routed_scaling_factor",
            temper="output_multiplier",
        )
    ),
    "nemotron_h": _family(
        _DEEPSEEK, num_hidden_layers=3, layers_block_type=["attention", "moe", "moe"]
    ),
    "olmoe": _family(_SWITCHED),
    "openai_privacy_filter": _family(Formula(score="softmax", normalise=True, averaged=True)),
    "qwen2_moe": _family(_SWITCHED),
    "qwen3_5_moe_text": _family(_NORMED, **HYBRID),
    "qwen3_moe": _family(_SWITCHED, norm_topk_prob=True),
    "qwen3_next": _family(_SWITCHED, **HYBRID),
    "qwen3_vl_moe_text": _family(_NORMED),
    "qwen4_exp_text": _family(_SWITCHED, **HYBRID),
    "solar_open": _family(_DEEPSEEK),
    "zaya": _family(_SOFTMAX, num_experts_per_tok=1),
}

REFUSED_UNBUILT = {"ernie4_5_vl_moe": REFUSED["Ernie4_5_VLMoeMoeBlock"]}
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


def family_of(model_type: str) -> FamilyEntry | None:
    """The entry of a config's `model_type`, that of a multimodal wrapper being its text model's."""
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
    settings = REFUSED_FAMILIES.get(known) or FAMILIES.get(known, FamilyEntry()).settings
    return AutoConfig.for_model(known, **{**small, **settings, **changes})


def build_family(name: str, *, seed: int = 0, **changes: Any) -> nn.Module:
    """A model of the family with random weights, in eval mode: 2 layers, 8 experts, 2 a token.

    A causal LM where the family has one, else the text model. Weights and correction biases are
    drawn wide, so that routing is spread over the experts and groups.

    Args:
        name: one of `family_names()`.
        seed: seed of the weights; torch's global generator is left as it was.
        changes: config fields.

    Raises:
        ValueError: the installed transformers does not know the family.
    """
    config = small_config(name, **changes)
    kinds = AutoModelForCausalLM, AutoModel
    kind = kinds[0] if type(config) in AutoModelForCausalLM._model_mapping else kinds[1]
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = kind.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if value.is_floating_point() and (value.ndim > 1 or "bias" in key):
                value.normal_(0, 0.3, generator=generator)
    return model.eval()
