"""Record and replay on every family of the installed transformers, and the checker's own teeth."""

import gc
import importlib
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from moe_rl.replay_check import check_replay
from moe_rl.replay_check.check import LAWS
from moe_rl.replay_check.families import (
    FAMILIES,
    REFUSED_FAMILIES,
    Formula,
    build_family,
    family_names,
    formula_of,
    small_config,
)
from moe_rl.routing import ReplayedRouting, find_routers
from moe_rl.routing.taps import ROUTER_CLASS_NAME

# What a law cannot say, and why, is written here: a law that stops applying is noticed.
NOT_APPLICABLE = {
    ("inkling_text", "weights"): "no formula",
    ("jetmoe", "checkpointing"): "supports no gradient checkpointing",
    ("openai_privacy_filter", "cache"): "no cache",
}


@pytest.mark.parametrize("family", family_names())
def test_every_law_of_replay_holds_on_every_family(family) -> None:
    findings = check_replay(build_family(family), formula=FAMILIES[family])
    assert [finding.check for finding in findings] == list(LAWS)
    for finding in findings:
        excuse = NOT_APPLICABLE.get((family, finding.check))
        if excuse is None:
            assert finding.passed, finding
        else:
            assert finding.passed is None and excuse in finding.reason, finding


@pytest.mark.parametrize("family", REFUSED_FAMILIES)
def test_families_without_a_topk_are_refused_with_the_reason(family) -> None:
    words = {"doge": "sub-key", "nllb-moe": "capacity", "phimoe": "sparsemixer"}
    with pytest.raises(ValueError, match=words.get(family, "argmax and drops tokens")):
        find_routers(build_family(family))


def test_routers_that_see_some_tokens_only_are_refused_with_the_reason() -> None:
    """Ernie 4.5 VL: text and image tokens have routers of their own."""

    class Ernie4_5_VLMoeMoeBlock(nn.Module):  # the family's block, by its class name
        pass

    with pytest.raises(ValueError, match="no router sees every token"):
        find_routers(nn.ModuleDict({"layers": nn.ModuleList([Ernie4_5_VLMoeMoeBlock()])}))


def test_no_family_of_the_installed_transformers_is_left_out() -> None:
    """A causal LM whose source has a class named like a router is in one of the two lists."""
    missing = []
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if name not in CONFIG_MAPPING:
            continue
        package = CONFIG_MAPPING[name].__module__.rpartition(".")[0]
        folder = Path(importlib.import_module(package).__file__ or "").parent
        source = "".join(path.read_text() for path in folder.glob("modeling_*.py"))
        classes = re.findall(r"^class (\w+)\(", source, flags=re.M)
        listed = {name, f"{name}_text"} & (FAMILIES.keys() | REFUSED_FAMILIES.keys())
        if any(ROUTER_CLASS_NAME.search(c) for c in classes) and not listed:
            missing.append(name)
    assert not missing


def test_group_limited_routers_are_known_as_such() -> None:
    for family in ("deepseek_v2", "deepseek_v3", "glm4_moe", "exaone_moe", "kimi_linear"):
        assert {tap.num_groups for tap in find_routers(build_family(family))} == {4}, family
    assert find_routers(build_family("deepseek_v2", topk_method="greedy"))[0].num_groups is None


@pytest.mark.parametrize(("family", "choices"), [("longcat_flash", 8 + 4), ("zaya", 8 + 1)])
def test_choices_without_weights_count_as_experts(family, choices) -> None:
    assert {tap.num_experts for tap in find_routers(build_family(family))} == {choices}


def test_an_unknown_family_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'qwen3_mo' is not a Mixture.*qwen3_moe"):
        small_config("qwen3_mo")
    assert formula_of("llama4") is FAMILIES["llama4_text"]
    assert formula_of("llama") is None


# The checker must see what is broken.


def outcome(model: nn.Module, formula: Formula | None = None) -> dict[str, str]:
    """Laws that fail, with their reasons."""
    found = check_replay(model, formula=formula)
    return {f.check: f.reason for f in found if f.passed is False}


def change_routers(model: nn.Module, change) -> nn.Module:
    """Pass what each router returns through `change(router, output)`."""
    for tap in find_routers(model):
        own = tap.module.forward

        def forward(*args, own=own, router=tap.module):
            return change(router, own(*args))

        tap.module.forward = forward
    return model


def test_a_wrong_formula_is_seen() -> None:
    model = build_family("qwen3_moe", norm_topk_prob=False)
    broken = outcome(model, Formula(score="softmax", normalise=True))
    assert broken.keys() == {"weights"} and "layer 0: gate weights are" in broken["weights"]


def test_a_router_without_gradient_is_seen() -> None:
    model = change_routers(build_family("olmoe"), lambda _, out: (out[0], out[1].detach(), out[2]))
    assert "router model.layers.0.mlp.gate gets no gradient" in outcome(model)["gradient"]


def test_a_gradient_of_the_wrong_size_is_seen() -> None:
    def halved(_, out):
        return out[0], out[1] / 2 + out[1].detach() / 2, out[2]

    broken = outcome(change_routers(build_family("olmoe"), halved))
    assert broken.keys() == {"gradient"} and "where a finite step finds" in broken["gradient"]


def test_experts_that_get_other_ids_than_the_record_are_seen() -> None:
    model = change_routers(build_family("olmoe"), lambda _, out: (out[0], out[1], (out[2] + 1) % 8))
    assert {"record", "foreign"} <= outcome(model).keys()


def test_weights_from_scores_that_the_choice_has_masked_are_seen() -> None:
    """The mistake of a hand-written replay: gate weights from zeroed top-k scores."""

    def masked(router, out):
        logits, weights, ids = out
        live = logits.topk(router.top_k).indices
        kept = torch.zeros_like(logits).scatter(-1, live, 1.0)
        return logits, weights * kept.gather(-1, ids), ids

    assert {"weights"} <= outcome(
        change_routers(build_family("olmoe"), masked), FAMILIES["olmoe"]
    ).keys()


def test_a_router_that_chooses_at_random_is_seen() -> None:
    model = build_family("olmoe")
    for tap in find_routers(model):
        tap.module.register_forward_pre_hook(lambda m, args: (args[0] + torch.randn_like(args[0]),))
    assert {"record", "replay", "gaps"} <= outcome(model).keys()


def test_the_checker_leaves_the_model_as_it_was() -> None:
    model = build_family("mixtral").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    check_replay(model.eval().train())
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    gc.collect()  # taps stay until the graphs that may recompute a router are gone
    assert all("forward" not in tap.module.__dict__ for tap in find_routers(model))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_live_choice_that_is_another_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_family("qwen3_moe")
    own = ReplayedRouting.live_routed_experts.fget

    def other(self: ReplayedRouting) -> torch.Tensor:
        routes = own(self).clone()
        routes[0, 0, 0] = (routes[0, 0, 0] + 1) % 8
        return routes

    monkeypatch.setattr(ReplayedRouting, "live_routed_experts", property(other))
    assert "the live choice under replay is not the record" in outcome(model)["replay"]


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_a_sound_bfloat16_model_fails_no_law(family: str) -> None:
    """The usual type of checkpoints; finite steps of such weights find no slope."""
    found = check_replay(build_family(family).bfloat16(), formula=FAMILIES[family])
    assert not [finding for finding in found if finding.passed is False]
    gradient = next(finding for finding in found if finding.check == "gradient")
    assert gradient.passed is None and "too coarse" in gradient.reason


@pytest.mark.parametrize(("family", "experts"), [("qwen3_moe", 8), ("mixtral", 8), ("mixtral", 1)])
def test_one_expert_of_weight_one_fails_no_law(family: str, experts: int) -> None:
    """Normalised, its weight is 1 whatever the router says: there is no gradient to find."""
    name = "num_experts" if family == "qwen3_moe" else "num_local_experts"
    model = build_family(family, num_experts_per_tok=1, **{name: experts})
    found = check_replay(model, formula=FAMILIES[family])
    assert not [finding for finding in found if finding.passed is False]
    gradient = next(finding for finding in found if finding.check == "gradient")
    assert gradient.passed is None and "gradient is 0" in gradient.reason
