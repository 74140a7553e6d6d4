"""Analysis room: the arms of the experiment, their fixed order and printed names."""

from __future__ import annotations

ARM_LABELS = {
    "grpo": "GRPO",
    "grpo+replay": "GRPO + replay",
    "gspo": "GSPO",
    "gspo+replay": "GSPO + replay",
    "dense": "dense control",
    "frozen-router": "frozen router",
    "grpo-restart": "GRPO restarted, half the rate",
    "grpo-restart-full-rate": "GRPO restarted, full rate",
}
ARM_ORDER = tuple(ARM_LABELS)


def arm_key(arm: str) -> tuple[int, str]:
    """Sort key: the arms of the experiment in their fixed order, then unknown ones by name."""
    return (ARM_ORDER.index(arm) if arm in ARM_ORDER else len(ARM_ORDER), arm)


def arm_label(arm: str) -> str:
    """The arm's name as figures and tables print it; an unknown arm goes by its own."""
    return ARM_LABELS.get(arm, arm)
