"""Finding the routers of a model."""

import pytest
import torch
from torch import nn
from transformers import AutoModel, SwitchTransformersConfig

from moe_rl.replay_check.families import build_family, family_names
from moe_rl.routing import find_routers, record_routing
from moe_rl.routing.taps import strip_wrappers

EXPERTS = 8
GATES = ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("qwen3_moe", GATES),
        ("olmoe", GATES),
        ("mixtral", GATES),
        ("gpt_oss", ["model.layers.0.mlp.router", "model.layers.1.mlp.router"]),
        ("deepseek_v3", GATES),
        ("llama4_text", [f"model.layers.{i}.feed_forward.router" for i in range(2)]),
    ],
)
def test_every_family_shows_its_routers(build, family, names) -> None:
    taps = find_routers(build(family))
    assert [tap.name for tap in taps] == names
    assert {(tap.num_experts, tap.top_k) for tap in taps} == {(EXPERTS, 2)}
    grouped = family.startswith("deepseek")
    assert {tap.num_groups for tap in taps} == {4 if grouped else None}


def test_routers_are_ordered_by_layer_number(build) -> None:
    """Neither by letters nor by registration."""
    model = build(num_hidden_layers=11)
    layers = list(model.model.layers)
    model.model.layers = nn.ModuleDict({str(i): layers[i] for i in reversed(range(11))})
    assert [tap.decoder_layer for tap in find_routers(model)] == list(range(11))


def test_dense_layers_have_no_router(build) -> None:
    taps = find_routers(build(num_hidden_layers=4, mlp_only_layers=[0, 2]))
    assert [tap.name for tap in taps] == ["model.layers.1.mlp.gate", "model.layers.3.mlp.gate"]


@pytest.mark.parametrize(
    ("path", "stripped"),
    [
        ("module.model.layers.3.mlp.gate", "model.layers.3.mlp.gate"),
        ("_fsdp_wrapped_module._orig_mod.model.layers.3.gate", "model.layers.3.gate"),
        ("model.layers.3._checkpoint_wrapped_module.mlp.gate", "model.layers.3.mlp.gate"),
        ("base_model.model.model.layers.3.mlp.gate", "model.layers.3.mlp.gate"),
        ("my_module.layers.3.submodule.gate", "my_module.layers.3.submodule.gate"),
    ],
)
def test_wrappers_leave_no_trace_in_names(path, stripped) -> None:
    assert strip_wrappers(path) == stripped


def test_a_wrapped_model_records_like_the_model(model, tokens) -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    wrapper = Wrapper(model)
    assert [t.name for t in find_routers(wrapper)] == [t.name for t in find_routers(model)]
    with torch.no_grad(), record_routing(wrapper) as outer, record_routing(model) as inner:
        wrapper.module(tokens)
    assert torch.equal(outer.routed_experts, inner.routed_experts)


def test_a_router_unknown_to_transformers_is_found_by_its_class_name() -> None:
    class MyTopKRouter(nn.Module):
        num_experts, top_k = 4, 1

    model = nn.ModuleDict({"layers": nn.ModuleList([MyTopKRouter()])})
    assert [(t.name, t.num_experts, t.top_k) for t in find_routers(model)] == [("layers.0", 4, 1)]


def test_a_dense_model_is_refused_by_name(build) -> None:
    with pytest.raises(ValueError, match=r"model: Qwen3ForCausalLM has no top-k router"):
        find_routers(build("qwen3"))


@pytest.mark.parametrize(
    ("family", "reason"), [("phimoe", "sparsemixer"), ("doge", "sub-key choices")]
)
def test_families_without_a_topk_over_experts_are_refused_with_the_reason(
    build, family, reason
) -> None:
    with pytest.raises(ValueError, match=rf"cannot be recorded or replayed: {family}.*{reason}"):
        find_routers(build(family))


def test_capacity_routers_are_refused_with_the_reason() -> None:
    small = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}
    config = SwitchTransformersConfig(
        vocab_size=32, num_experts=4, encoder_sparse_step=1, decoder_sparse_step=1, **small
    )
    with pytest.raises(ValueError, match="drops tokens above the capacity"):
        find_routers(AutoModel.from_config(config))


def test_routers_that_differ_in_size_are_refused(model) -> None:
    find_routers(model)[1].module.top_k = 3
    with pytest.raises(ValueError, match=r"differ in \(experts, experts per token\)"):
        find_routers(model)


def test_a_router_of_unknown_size_is_refused_by_name() -> None:
    class BareTopKRouter(nn.Module):
        pass

    with pytest.raises(AttributeError, match="'BareTopKRouter' object has no attribute 'num_exp"):
        find_routers(nn.ModuleDict({"gate": BareTopKRouter()}))


@pytest.mark.parametrize("family", family_names())
def test_a_router_is_said_to_rank_by_logits_exactly_where_it_does(family) -> None:
    """Of random correction biases; the other routers' logits do not say who is next."""
    model = build_family(family)
    tokens = torch.randint(2, 60, (4, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), record_routing(model, router_logits=True) as recorded:
        model(tokens)
    taps, chosen = find_routers(model), recorded.routed_experts.long()
    largest = recorded.router_logits.topk(chosen.shape[-1], dim=-1).indices
    same = (chosen.sort().values == largest.sort().values).all(-1).flatten(0, 1).all(0)
    if family == "deepseek_v2":  # opens groups by their best expert, and so those of the best two
        assert same.all()
        same[:] = False
    assert [tap.ranks_by_logits for tap in taps] == same.tolist()


@pytest.mark.parametrize("family", ["deepseek_v3", "minimax_m2", "ernie4_5_moe", "laguna"])
def test_a_bias_that_is_equal_for_all_experts_moves_no_choice(family) -> None:
    model = build_family(family, **({"n_group": 1, "topk_group": 1} if "deep" in family else {}))
    for tap in find_routers(model):
        assert tap.correction_bias is not None and not tap.ranks_by_logits
        tap.correction_bias.data.fill_(0.5)
        assert tap.ranks_by_logits
