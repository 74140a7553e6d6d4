"""Routing room: find the top-k routers of a transformers Mixture-of-Experts model.

Routers are found through `PreTrainedModel._can_record_outputs["router_logits"]`, the map in which
transformers itself names the router class of every family, and then by class name for models
that lack the map. Nothing here looks at what a router returns: orders differ between families
and versions.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

WRAPPERS = re.compile(
    r"(?<![^.])((_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod|base_model\.model|module)\.)+"
)

ROUTER_CLASS_NAME = re.compile(r"(TopK|Topk|TokenChoice|MoE\w*|MoeV1)(Router|Gating|Gate)$")

NUM_EXPERTS_NAMES = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
TOP_K_NAMES = ("top_k", "num_experts_per_tok", "moe_top_k", "moe_topk", "top_k_experts", "moe_k")
CORRECTION_BIAS_NAMES = ("e_score_correction_bias", "expert_bias", "moe_statics")

REFUSED = {
    "PhimoeTopKRouter": "phimoe's sparsemixer picks its experts one after another by argmax over "
    "masked scores, so there is no top-k whose ids could be recorded or replayed",
    "SwitchTransformersTop1Router": "switch_transformers routes by argmax and drops tokens above "
    "the capacity of an expert, so ids alone do not determine the routing",
    "NllbMoeTop2Router": "nllb_moe routes by two argmaxes and drops tokens above the capacity of "
    "an expert, so ids alone do not determine the routing",
    "DogeCDMoE": "doge retrieves experts through the product of two sub-key choices, so one top-k "
    "over experts does not exist",
}


@dataclass(frozen=True, eq=False, kw_only=True)
class RouterTap:
    """One router of a model: where the choice of experts of one MoE layer is made."""

    name: str
    """Module path without wrapper prefixes (FSDP, checkpoint, compile, DDP, PEFT)."""
    module: nn.Module
    """The router module; its `forward` calls `topk` over the experts once."""
    num_experts: int
    """E, experts that the router chooses from."""
    top_k: int
    """K, experts per token."""
    num_groups: int | None = None
    """Expert groups of a group-limited router (DeepSeek), None for a plain router."""

    @property
    def corrects_scores(self) -> bool:
        """True if a bias is added to the scores before the choice (DeepSeek-V3 and others)."""
        return any(
            getattr(self.module, name, None) is not None
            for name in CORRECTION_BIAS_NAMES
            if name != "expert_bias" or getattr(self.module, "use_expert_bias", True)
        )


def find_routers(model: nn.Module) -> list[RouterTap]:
    """Return the L routers of `model`, ordered by the layer index in their module path.

    Args:
        model: a transformers MoE model, or a module (DDP, FSDP, PEFT wrapper) that contains one.

    Raises:
        ValueError: `model` has no top-k router; its family routes in a way that ids do not
            determine (phimoe, switch_transformers, nllb_moe, doge); or its routers differ in E
            or K, so that one `[B, S, L, K]` record cannot hold them.
    """
    return survey(model)[0]


def survey(model: nn.Module) -> tuple[list[RouterTap], nn.Module]:
    """Return the routers of `model` and the deepest PreTrainedModel that contains them all.

    That model is where forwards are watched: `model(...)` and `model.model(...)` both pass it.
    """
    modules = list(model.named_modules())
    classes = _recorded_classes(module for _, module in modules)
    for recorded in sorted(classes, key=lambda c: c.__name__):
        if recorded.__name__ in REFUSED:
            raise ValueError(
                f"model: the routing of {type(model).__name__} cannot be recorded or replayed: "
                f"{REFUSED[recorded.__name__]}. Use a model with a plain top-k router."
            )
    found = [(path, module) for path, module in modules if isinstance(module, tuple(classes))]
    if not found:
        found = [(path, m) for path, m in modules if ROUTER_CLASS_NAME.search(type(m).__name__)]
    # JetMoE names the attention block that contains its router; the inner match is the router.
    found = [
        (path, module)
        for path, module in found
        if not any(other.startswith(f"{path}.") for other, _ in found)
    ]
    if not found:
        raise ValueError(
            f"model: {type(model).__name__} has no top-k router, so there is no routing to record "
            "or replay. Pass a Mixture-of-Experts model (Qwen3-MoE, OLMoE, Mixtral, ...)."
        )
    by_path = dict(modules)
    found.sort(key=lambda item: _layer_index(item[0]))
    paths = [_path_of_choice(path, by_path) for path, _ in found]
    taps = [_tap(path, by_path[path], model) for path in paths]
    _require_uniform(taps, model)
    return taps, _deepest_model(modules, paths) or model


def _recorded_classes(modules: Iterator[nn.Module]) -> set[type]:
    classes: set[type] = set()
    for module in modules:
        if not isinstance(module, PreTrainedModel):
            continue
        recorded: Any = (module._can_record_outputs or {}).get("router_logits", [])
        entries: list[Any] = recorded if isinstance(recorded, list) else [recorded]
        classes.update(getattr(entry, "target_class", entry) for entry in entries)
    return {entry for entry in classes if isinstance(entry, type)}


def _layer_index(path: str) -> int:
    return next((int(part) for part in path.split(".") if part.isdigit()), -1)


def _path_of_choice(path: str, modules: dict[str, nn.Module]) -> str:
    """DBRX's router only scores; the block around it calls `topk`, and is what must be tapped."""
    parent = path.rpartition(".")[0]
    if hasattr(modules.get(parent), "route_tokens_to_experts"):
        return parent
    return path


def _tap(path: str, module: nn.Module, model: nn.Module) -> RouterTap:
    groups = getattr(module, "num_group", None) or getattr(module, "n_group", None)
    if getattr(module, "topk_method", None) == "greedy":
        groups = None
    return RouterTap(
        name=strip_wrappers(path),
        module=module,
        num_experts=_setting(module, model, NUM_EXPERTS_NAMES, path),
        top_k=_setting(module, model, TOP_K_NAMES, path),
        num_groups=groups,
    )


def strip_wrappers(path: str) -> str:
    """Return a module path without the components that wrappers put into it."""
    return WRAPPERS.sub("", path)


def _setting(module: nn.Module, model: nn.Module, names: tuple[str, ...], path: str) -> int:
    for owner in _owners(module, model):
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int):
                return value
    raise ValueError(
        f"model: router {path!r} ({type(module).__name__}) tells none of {', '.join(names)}, "
        "neither itself nor in its config. Set the attribute on the router module."
    )


def _owners(module: nn.Module, model: nn.Module) -> Iterator[Any]:
    """Where a router's sizes may be written. Lazy: contexts open in hot loops."""
    yield module
    yield getattr(module, "config", None)
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    yield text
    yield getattr(text, "ffn_config", None)


def _require_uniform(taps: list[RouterTap], model: nn.Module) -> None:
    shapes = sorted({(tap.num_experts, tap.top_k) for tap in taps})
    if len(shapes) > 1:
        raise ValueError(
            f"model: the routers of {type(model).__name__} differ in (experts, experts per token): "
            f"{shapes}. One record holds one kind; pass the submodel whose routers agree."
        )


def _deepest_model(modules: list[tuple[str, nn.Module]], paths: list[str]) -> nn.Module | None:
    deepest = None
    for path, module in modules:  # parents come before children
        prefix = f"{path}." if path else ""
        if isinstance(module, PreTrainedModel) and all(p.startswith(prefix) for p in paths):
            deepest = module
    return deepest
