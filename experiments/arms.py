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
    return ARMS[name].change(base, replay).replace(arm=name, seed=seed)


RESTART = "grpo-restart"
# Before the collapse: in no setting of the study has GRPO fallen by then.
_RESTART_STEP = 5


def restart_config(original: RunConfig, folder: Path) -> tuple[RunConfig, RunConfig]:
    """(the restarted run, the original that saves what it starts from).

    GSPO paper, 5.3: after a collapse training cannot be resumed, even from an earlier checkpoint
    with other hyperparameters. So the restart takes the policy from before the collapse, fresh
    optimiser state and half the learning rate.

    Args:
        original: the run that collapses.
        folder: its run folder.
    """
    original = original.replace(save_every=_RESTART_STEP)
    restarted = dataclasses.replace(
        original,
        arm=RESTART,
        model=dataclasses.replace(
            original.model, checkpoint=str(folder / f"policy_{_RESTART_STEP:05d}")
        ),
        learning_rate=original.learning_rate / 2,
        steps=original.steps - _RESTART_STEP,
        save_every=0,
    )
    return restarted, original
