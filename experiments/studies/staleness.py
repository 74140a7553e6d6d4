"""Staleness: is what happens in the setting stale the age of the data, or its small updates?

stale makes 32 updates on a rollout of 32 prompts, so that each update has one prompt and there are
640 of them, where mild-stale has 160 of four prompts, at the same learning rate.
Settings: stale; fresh, the same 640 updates of one prompt, each on a rollout of its own, so that no
update is stale, with the same schedule of the learning rate; stale-wide, 32 updates of four prompts
on rollouts of 128 prompts; stale-half, stale at half the learning rate.
Arms: GRPO and GSPO, on the MoE and on the dense control; in stale-wide, as its first two seeds
showed GRPO to fall on the MoE alone, also GRPO with replay (R2), with dual clip and over rollout
log-probs.
Seeds: 21 to 25.
Primary outcome: final reward. Tests: each other setting against stale for each arm, exact sign-flip
test, Holm's correction over the arms of a setting; of five seeds no p falls below 0.06, so that the
intervals are what is read. The age of the data is the cause if fresh ends above stale by more than
0.1 for GRPO and for dense GRPO, and stale-wide does not.
"""

from pathlib import Path

from moe_rl.config import RunConfig
from moe_rl.experiments.study import FIVE_SEEDS, Comparison, of_arms
from moe_rl.presets import preset

ARMS = ("grpo", "gspo", "dense", "dense-gspo")
CURES = ("grpo+replay", "grpo+dual-clip", "grpo+rollout-old")


def runs(root: Path) -> list[RunConfig]:
    """The arms in every setting."""
    stale = preset("stale")
    updates = stale.updates_per_rollout
    wide = stale.replace(setting="stale-wide", prompts_per_rollout=4 * stale.prompts_per_rollout)
    settings = [
        stale,
        wide,
        stale.replace(
            setting="fresh",
            prompts_per_rollout=stale.prompts_per_rollout // updates,
            updates_per_rollout=1,
            steps=stale.steps * updates,
            warmup_steps=stale.warmup_steps * updates,
        ),
        stale.replace(setting="stale-half", learning_rate=stale.learning_rate / 2),
    ]
    configs = [config for setting in settings for config in of_arms(setting, ARMS, FIVE_SEEDS)]
    return configs + of_arms(wide, CURES, FIVE_SEEDS)


def tests() -> list[Comparison]:
    """Every setting against stale."""
    return [
        Comparison(setting, ("stale", arm), (setting, arm))
        for setting in ("fresh", "stale-wide", "stale-half")
        for arm in ARMS
    ]
