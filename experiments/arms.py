"""The arms of the study: what is compared, each a small change to one base config."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moe_rl.config import RoutingReplay, RunConfig


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One arm: its name, what it is for, and how its config differs from the base."""

    name: str
    purpose: str
    change: Callable[[RunConfig, RoutingReplay], RunConfig]


def _dense(base: RunConfig, _: RoutingReplay) -> RunConfig:
    # As many experts as are active: equal active size, and no choice left to the router.
    return base.replace(algorithm="grpo", num_experts=base.model.experts_per_token)


ARMS = {
    arm.name: arm
    for arm in (
        Arm(
            name="grpo",
            purpose="token ratios, live routing: the arm that is said to collapse",
            change=lambda base, replay: base.replace(algorithm="grpo"),
        ),
        Arm(
            name="grpo+replay",
            purpose="the same with Routing Replay: the paper's baseline",
            change=lambda base, replay: base.replace(algorithm="grpo", routing_replay=replay),
        ),
        Arm(
            name="gspo",
            purpose="sequence ratios, live routing: said to need no replay",
            change=lambda base, replay: base.replace(algorithm="gspo"),
        ),
        Arm(
            name="gspo+replay",
            purpose="sequence ratios with Routing Replay",
            change=lambda base, replay: base.replace(algorithm="gspo", routing_replay=replay),
        ),
        Arm(
            name="dense",
            purpose="control under GRPO: equal active size, every expert always on",
            change=_dense,
        ),
        Arm(
            name="frozen-router",
            purpose="control under GRPO: router weights stay at the cold start",
            change=lambda base, replay: base.replace(algorithm="grpo", freeze_router=True),
        ),
    )
}

MAIN_ARMS = ("grpo", "grpo+replay", "gspo")


def arm_config(name: str, base: RunConfig, *, replay: RoutingReplay, seed: int) -> RunConfig:
    """The config of one arm of a study.

    Args:
        name: a key of `ARMS`.
        base: the setting.
        replay: R2 where staleness is studied, R3 where two engines differ.
        seed: paired over arms: equal seeds see equal prompts and sampling numbers.
    """
    changed = ARMS[name].change(base, replay)
    # A study that loses its worst runs would flatter the arm that made them.
    return changed.replace(arm=name, seed=seed, on_nonfinite="skip")


RESTARTS = {"grpo-restart": 0.5, "grpo-restart-full-rate": 1.0}
"""GRPO started again from before its collapse, and the share of its learning rate: half, as a
user would try to save the run, and all of it, which tells what the fresh start alone does."""
# Before the collapse: in no setting of the study has GRPO fallen by then.
_RESTART_STEP = 5


def saving_for_restart(original: RunConfig) -> RunConfig:
    """The run with what `restart_config` starts from saved on the way."""
    return original.replace(save_every=_RESTART_STEP)


def restart_config(name: str, original: RunConfig, folder: Path) -> RunConfig:
    """The run `name` of `RESTARTS`, from the policy that the original saved before its collapse.

    GSPO paper, 5.3: after a collapse training cannot be resumed, even from an earlier checkpoint
    with other hyperparameters. The optimiser state is fresh.

    Args:
        name: a key of `RESTARTS`.
        original: the run that collapses, as `saving_for_restart` has it.
        folder: its run folder.
    """
    checkpoint = str(folder / f"policy_{_RESTART_STEP:05d}")
    return dataclasses.replace(
        original,
        arm=name,
        model=dataclasses.replace(original.model, checkpoint=checkpoint),
        learning_rate=original.learning_rate * RESTARTS[name],
        steps=original.steps - _RESTART_STEP,
        save_every=0,
    )
