"""Integrations: what replay in TRL's GRPOTrainer does not support, refused with the way out."""

import importlib.metadata
from typing import Any

from torch import Tensor

from moe_rl.integrations.engine_routes import FIELD
from moe_rl.routing import find_routers

# The mixin overrides methods that TRL does not promise to keep: elsewhere it might replay nothing
# and say nothing.
TESTED = "1.16"
# Without TRR: no record that a rollout_func returns has gate weights.
MODES = ("disabled", "R2", "R3")


def require_tested_trl() -> None:
    """Raise ImportError unless the installed TRL is of the tested release."""
    try:
        version = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        version = "none"
    if not version.startswith(f"{TESTED}."):
        raise ImportError(
            f"trl: version {version} is installed, and the integration is tested with {TESTED}; "
            "pip install 'moe-rl[trl]'"
        )


def require_support(trainer: Any) -> None:
    """Raise ValueError unless a trainer's options, model and inputs can be replayed."""
    mode = trainer.routing_replay
    if mode not in MODES:
        expected = ", ".join(MODES)
        raise ValueError(f"routing_replay={mode!r}: unknown; expected one of {expected}")
    if mode == "disabled" and not trainer.routing_diagnostics:
        return
    find_routers(trainer.model)
    if trainer._is_vlm:
        raise ValueError(
            "processing_class: image tokens are put in by the model, so routes cannot be laid "
            "beside the tokens of the batch; pass a tokenizer and a text model"
        )
    adapter = getattr(trainer.model, "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False):
        raise ValueError(
            "peft_config: prompt learning puts virtual tokens before the batch, which no record "
            "has places for; use LoRA or another adapter of weights"
        )
    if mode == "R3" and trainer.rollout_func is None:
        raise ValueError(
            "routing_replay='R3': it replays the rollout engine's choices, and TRL's own "
            f"generation does not return them; pass a rollout_func that returns {FIELD!r} "
            "(docs/integrations.md), or use routing_replay='R2'"
        )


def require_same_tokens(record: Tensor, tokens: Tensor) -> None:
    """Raise ValueError unless a record [B, S, ...] is of a forward of `tokens` [B, S]."""
    if record.shape[:2] != tokens.shape:
        raise ValueError(
            f"{FIELD}: a record of {list(record.shape[:2])} positions for a forward of "
            f"{list(tokens.shape)}, so something changed the batch after the rollout; switch off "
            "packing, padding-free batches and context parallelism"
        )
