"""Integrations: what replay in TRL's GRPOTrainer does not support, refused with the way out."""

import importlib.metadata
from typing import Any, get_args

from torch import Tensor

from moe_rl.config import RoutingReplay
from moe_rl.integrations.engine_routes import FIELD
from moe_rl.routing import find_routers

# The mixin overrides methods that TRL does not promise to keep, hence a range that was tested.
TESTED = ((1, 16), (1, 17))


def require_tested_trl() -> None:
    """Raise ImportError unless the installed TRL is of the tested range."""
    low, high = (".".join(map(str, version)) for version in TESTED)
    way_out = f"pip install 'moe-rl[trl]' (trl>={low},<{high})"
    try:
        version = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(f"TRL is not installed: {way_out}") from error
    major, minor = (int(part) for part in version.split(".")[:2])
    if not TESTED[0] <= (major, minor) < TESTED[1]:
        raise ImportError(
            f"TRL {version} is outside of the tested range: the mixin overrides methods that may "
            f"differ there, and would then replay nothing without a word. {way_out}"
        )


def require_options(mode: str, diagnostics: bool, attribution_every: int) -> None:
    """Raise ValueError unless the mixin's own arguments make sense together."""
    modes = get_args(RoutingReplay)
    if mode not in modes:
        raise ValueError(f"routing_replay: {mode!r}; expected one of {', '.join(modes)}.")
    if attribution_every < 0 or (attribution_every and not diagnostics):
        raise ValueError(
            f"attribution_every: {attribution_every}; expected 0 (never) or more, and above 0 "
            "only with routing_diagnostics=True, of which the split is a part."
        )


def require_support(trainer: Any) -> None:
    """Raise ValueError unless the model and the inputs of a GRPOTrainer can be replayed."""
    find_routers(trainer.model)
    if trainer._is_vlm:
        raise ValueError(
            "processing_class: a processor of images. Image tokens are put in by the model, so "
            "routes cannot be laid beside the tokens of the batch. Pass a tokenizer and a model of "
            "text, or use TRL's own trainer."
        )
    adapter = getattr(trainer.model, "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False):
        raise ValueError(
            "peft_config: prompt learning puts virtual tokens before the batch, which no record "
            "has places for. Use LoRA or another adapter of weights."
        )
    if trainer.routing_replay == "R3" and trainer.rollout_func is None:
        raise ValueError(
            "routing_replay: R3 replays the rollout engine's choices, and TRL's own generation "
            f"does not return them. Pass a rollout_func that returns {FIELD!r} "
            "(docs/integrations.md), or take routing_replay='R2'."
        )


def require_same_tokens(record: Tensor, tokens: Tensor) -> None:
    """Raise ValueError unless a record [B, S, ...] is of a forward of `tokens` [B, S]."""
    if record.shape[:2] != tokens.shape:
        raise ValueError(
            f"{FIELD}: a record of {list(record.shape[:2])} positions for a forward of "
            f"{list(tokens.shape)}. Something changed the batch after the rollout; packing, "
            "padding-free batches and context parallelism cannot be replayed."
        )
