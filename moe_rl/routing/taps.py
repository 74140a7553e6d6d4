"""Find the routers of a Mixture-of-Experts model.

A router is the module whose `forward` makes the choice of experts. Three signs give it away, the
innermost module winning where one contains another:

1. it is a `ChoosesExperts`: somebody's own router that offers its choice for replay;
2. transformers names its class in `PreTrainedModel._can_record_outputs["router_logits"]`;
3. its class is named as routers are in transformers (`...TopKRouter`, `...TopkRouter`, `...Gate`),
   or it is a block with a method `route_tokens_to_experts` (DBRX; Jamba and Aria before 5.18).

Nothing here looks at what a router returns: orders differ between families and versions.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

WRAPPERS = re.compile(
    r"(?<![^.])((_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod|base_model\.model|module)\.)+"
)

ROUTER_CLASS_NAME = re.compile(
    r"(TopK|Topk|TokenChoice|MoE\w*|MoeV1)(Router|Gating|Gate)$|^Llama4Router$"
)

ROUTING_METHOD = "route_tokens_to_experts"
"""The method in which a block that routes by itself returns ids and gate weights."""

NUM_EXPERTS_NAMES = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
TOP_K_NAMES = ("top_k", "num_experts_per_tok", "moe_top_k", "moe_topk", "top_k_experts", "moe_k")
CORRECTION_BIAS_NAMES = (
    *("e_score_correction_bias", "expert_bias", "balancing_biases"),
    "moe_statics.e_score_correction_bias",
)

CAPACITY = "drops tokens above the capacity of an expert, so ids alone do not determine the routing"
NO_TOP_K = {
    "PhimoeTopKRouter": "phimoe's sparsemixer picks its experts one after another by argmax over "
    "masked scores, so there is no top-k whose ids could be recorded or replayed",
    "SwitchTransformersTop1Router": f"switch_transformers routes by argmax and {CAPACITY}",
    "NllbMoeTop2Router": f"nllb_moe routes by two argmaxes and {CAPACITY}",
    "DogeCDMoE": "doge retrieves experts through the product of two sub-key choices, so one top-k "
    "over experts does not exist",
    "Ernie4_5_VLMoeMoeBlock": "ernie4_5_vl_moe routes text and image tokens by routers of their "
    "own, so no router sees every token",
}


class ChoosesExperts(Protocol):
    """A router of your own, made recordable and replayable by one method.

        class MyRouter(nn.Module):
            num_experts, top_k = 64, 4
            def select_experts(self, scores):           # the choice, however you make it
                return my_kernel(scores + self.bias)
            def forward(self, hidden):
                scores = self.proj(hidden).sigmoid()
                ids = self.select_experts(scores)       # called once a forward
                return ids, scores.gather(-1, ids)      # weights from the FULL scores

    Under replay `select_experts` is answered in its place, so `forward` must take its weights from
    scores that still hold every expert: scores that the choice has masked have no gradient at
    foreign ids.
    """

    num_experts: int
    top_k: int

    def select_experts(self, scores: Tensor) -> Tensor:
        """Scores `[..., E]` to int64 ids `[..., K]`, different within a token."""
        ...


@dataclass(frozen=True, eq=False, kw_only=True)
class RouterTap:
    """One router of a model: where the choice of experts of one MoE layer is made."""

    name: str
    """Module path without wrapper prefixes (FSDP, checkpoint, compile, DDP, PEFT)."""
    module: nn.Module
    """The router module; its `forward` calls `topk` over the experts once, or `select_experts`."""
    num_experts: int
    """E, experts that the router chooses from, those without weights (LongCat, Zaya) included."""
    top_k: int
    num_groups: int | None = None
    """Expert groups of a group-limited router (DeepSeek), None for a plain router."""
    correction_bias: Tensor | None = None
    """What is added to the scores for the choice alone, `[E]` or `[1, E]`; None: nothing is."""

    @property
    def has_method(self) -> bool:
        """True if the router is a `ChoosesExperts`."""
        return hasattr(type(self.module), "select_experts")

    @property
    def follows_logits(self) -> bool:
        """False if groups, a correction bias or its own method may choose by more than logits."""
        plain = self.num_groups is None and not self.has_method
        return plain and self.correction_bias is None

    @property
    def ranks_by_logits(self) -> bool:
        """Whether the choice is the K largest logits, as groups and biases are now.

        True also of one group, and of a bias that is equal for all experts, as a new model has it.
        """
        if self.has_method or (self.num_groups or 1) > 1:
            return False
        bias = self.correction_bias
        return bias is None or bool(bias.amin() == bias.amax())

    def parameters(self) -> Iterator[nn.Parameter]:
        """The router's own parameters.

        Where a whole block routes by itself (DBRX) these are the ones outside its experts.
        """
        routes_itself = hasattr(type(self.module), ROUTING_METHOD)
        for name, parameter in self.module.named_parameters():
            if not (routes_itself and "expert" in name):
                yield parameter

    @property
    def decoder_layer(self) -> int:
        """Index of the decoder layer, as the module path has it; -1 where it has none."""
        return _layer_index(self.name)


def find_routers(model: nn.Module) -> list[RouterTap]:
    """Return the L routers of `model`, ordered by the layer index in their module path.

    `model` may be a wrapper (DDP, FSDP, PEFT) of a model with routers.

    Raises:
        ValueError: `model` has no router; it is compiled; its family routes in a way that ids do
            not determine (phimoe, switch_transformers, nllb_moe, doge, ernie4_5_vl_moe); or its
            routers differ in E or K, so that one `[B, S, L, K]` record cannot hold them.
    """
    return survey(model)[0]


def survey(model: nn.Module) -> tuple[list[RouterTap], nn.Module]:
    """Return the routers of `model` and the deepest PreTrainedModel that contains them all.

    That model is where forwards are watched: `model(...)` and `model.model(...)` both pass it.
    """
    modules = list(model.named_modules())
    _refuse(model, modules)
    by_path = dict(modules)
    paths = sorted(_router_paths(modules), key=_layer_index)
    if not paths:
        raise ValueError(
            f"model: {type(model).__name__} has no top-k router, so there is no routing to record "
            "or replay; pass a Mixture-of-Experts model (Qwen3-MoE, OLMoE, Mixtral, ...), or give "
            "your own router the method of moe_rl.routing.ChoosesExperts"
        )
    for path in paths:
        if {"modules_to_save", "original_module"} & set(path.split(".")):
            raise ValueError(
                f"model: PEFT keeps two copies of the router {path!r} (modules_to_save), of which "
                "adapters decide the one that routes; adapt it by LoRA (target_modules or "
                "target_parameters), or merge the adapter first"
            )
    taps = [_tap(path, by_path, model) for path in paths]
    shapes = sorted({(tap.num_experts, tap.top_k) for tap in taps})
    if len(shapes) > 1:
        raise ValueError(
            f"model: the routers of {type(model).__name__} differ in (experts, experts per token): "
            f"{shapes}, and one record holds one kind; pass the submodel whose routers agree"
        )
    return taps, _deepest_model(modules, paths) or model


def _refuse(model: nn.Module, modules: list[tuple[str, nn.Module]]) -> None:
    for path, module in modules:
        reason = NO_TOP_K.get(type(module).__name__)
        if reason is not None:
            raise ValueError(
                f"model: the routing of {type(model).__name__} cannot be recorded or replayed: "
                f"{reason}; use a model with a plain top-k router"
            )
        compiled = "_orig_mod" in module._modules or module._compiled_call_impl is not None
        if compiled and _router_paths(list(module.named_modules())):
            raise ValueError(
                f"model: {path or type(module).__name__!r} is compiled by torch.compile, so "
                "whether a record or a replay reaches its routers depends on what was traced when; "
                "pass and call the model that is not compiled (parts without a router, as "
                "attention or the output head, may be compiled one by one)"
            )


def _router_paths(modules: list[tuple[str, nn.Module]]) -> list[str]:
    # Decided once a class: contexts open in hot loops, and a large model has thousands of modules.
    classes = {type(module) for _, module in modules}
    own = {c for c in classes if hasattr(c, "select_experts")}
    if own:
        return [path for path, module in modules if type(module) in own]
    blocks = {c for c in classes if hasattr(c, ROUTING_METHOD)}
    recorded = tuple(_recorded_classes(module for _, module in modules))
    routers = {
        c for c in classes if issubclass(c, recorded) or ROUTER_CLASS_NAME.search(c.__name__)
    }
    around = [path for path, module in modules if type(module) in blocks]
    found = [
        path
        for path, module in modules
        # A block that routes by itself contains a module that only scores.
        if type(module) in routers and not any(path.startswith(f"{block}.") for block in around)
    ]
    found += [path for path in around if path not in found]
    return [path for path in found if not any(other.startswith(f"{path}.") for other in found)]


def _recorded_classes(modules: Iterator[nn.Module]) -> set[type]:
    classes: set[type] = set()
    for module in modules:
        if not isinstance(module, PreTrainedModel):
            continue
        recorded: Any = (module._can_record_outputs or {}).get("router_logits", [])
        entries: list[Any] = recorded if isinstance(recorded, list) else [recorded]
        classes.update(getattr(entry, "target_class", entry) for entry in entries)
    # transformers 5.17 names nn.Linear for Jamba, which is every matrix of the model.
    return {c for c in classes if isinstance(c, type) and not c.__module__.startswith("torch.")}


def _layer_index(path: str) -> int:
    return next((int(part) for part in path.split(".") if part.isdigit()), -1)


def _tap(path: str, by_path: dict[str, nn.Module], model: nn.Module) -> RouterTap:
    module = by_path[path]
    groups = getattr(module, "num_group", None) or getattr(module, "n_group", None)
    if getattr(module, "topk_method", None) == "greedy" or hasattr(module, "select_experts"):
        groups = None
    bias = _correction_bias(module)
    if bias is None and "." in path:
        # Some blocks hold it themselves and hand it to their router (MiniMax-M2, LFM2, Afmoe).
        bias = _correction_bias(by_path[path.rpartition(".")[0]])
    return RouterTap(
        name=strip_wrappers(path),
        module=module,
        # One entry a choice, also for experts without weights that num_experts leaves out.
        num_experts=_setting(module, model, NUM_EXPERTS_NAMES) if bias is None else bias.numel(),
        top_k=_setting(module, model, TOP_K_NAMES),
        num_groups=groups,
        correction_bias=bias,
    )


def _correction_bias(module: nn.Module) -> Tensor | None:
    if not getattr(module, "use_expert_bias", True):
        return None
    for name in CORRECTION_BIAS_NAMES:
        owner: Any = module
        for part in name.split("."):
            owner = getattr(owner, part, None)
        if isinstance(owner, Tensor):
            return owner
    return None


def strip_wrappers(path: str) -> str:
    """Return a module path without the components that wrappers put into it."""
    return WRAPPERS.sub("", path)


def _setting(module: nn.Module, model: nn.Module, names: tuple[str, ...]) -> int:
    """The first of `names` that a router or its config has; a router of your own must have one."""
    found = (getattr(owner, name, None) for owner in _owners(module, model) for name in names)
    value = next((value for value in found if isinstance(value, int)), None)
    return int(getattr(module, names[0]) if value is None else value)


def _owners(module: nn.Module, model: nn.Module) -> Iterator[Any]:
    """Where a router's sizes may be written. Lazy: contexts open in hot loops."""
    yield module
    yield getattr(module, "config", None)
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    yield text
    yield getattr(text, "ffn_config", None)


def _deepest_model(modules: list[tuple[str, nn.Module]], paths: list[str]) -> nn.Module | None:
    deepest = None
    for path, module in modules:  # parents come before children
        prefix = f"{path}." if path else ""
        if isinstance(module, PreTrainedModel) and all(p.startswith(prefix) for p in paths):
            deepest = module
    return deepest
