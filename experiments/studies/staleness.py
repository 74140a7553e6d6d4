"""Staleness: is what happens in the setting stale the age of the data, or its small updates?

stale makes 32 updates on a rollout of 32 prompts, so that each update has one prompt and there are
640 of them, where mild-stale has 160 of four prompts, at the same learning rate.
Settings: stale; fresh, the same 640 updates of one prompt, each on a rollout of its own, so that no
update is stale, with the same schedule of the learning rate; stale-wide, 32 updates of four prompts
on rollouts of 128 prompts; fresh-wide, the 640 updates of stale-wide, each on a rollout of its own;
stale-half, stale at half the learning rate.
Arms: GRPO and GSPO, on the MoE and on the dense control; in stale-wide, as its first two seeds
showed GRPO to fall on the MoE alone, also GRPO with replay (R2), with dual clip and over rollout
log-probs.
Seeds: 21 to 25; in stale-wide and fresh-wide 21 to 28.
Primary outcome: final reward. Tests: each other setting against stale, and fresh-wide against
stale-wide, for each arm; in stale-wide each cure against GRPO. Exact sign-flip test, Holm's
correction over the arms of a setting; of five seeds no p falls below 0.06, so that there the
intervals are what is read. The age of the data is the cause if fresh ends above stale by more than
0.1 for GRPO and for dense GRPO, and stale-wide does not. Among updates of four prompts age costs an
arm what fresh-wide ends above stale-wide.
History: fresh-wide was added after five seeds of stale-wide had been seen, and seeds 26 to 28 after
three seeds of both.
"""

from pathlib import Path

from moe_rl.config import RunConfig
from moe_rl.experiments.study import EIGHT_SEEDS, FIVE_SEEDS, Comparison, of_arms
from moe_rl.presets import preset

ARMS = ("grpo", "gspo", "dense", "dense-gspo")
CURES = ("grpo+replay", "grpo+dual-clip", "grpo+rollout-old")


def runs(root: Path) -> list[RunConfig]:
    """The arms in every setting."""
    stale = preset("stale")
    wide = stale.replace(setting="stale-wide", prompts_per_rollout=4 * stale.prompts_per_rollout)
    half = stale.replace(setting="stale-half", learning_rate=stale.learning_rate / 2)
    configs = []
    for setting in (stale, _fresh(stale, "fresh"), half):
        configs += of_arms(setting, ARMS, FIVE_SEEDS)
    for setting in (wide, _fresh(wide, "fresh-wide")):
        configs += of_arms(setting, ARMS, EIGHT_SEEDS)
    return configs + of_arms(wide, CURES, EIGHT_SEEDS)


def _fresh(base: RunConfig, setting: str) -> RunConfig:
    """The same updates and the same schedule, each update on a rollout of its own."""
    updates = base.updates_per_rollout
    return base.replace(
        setting=setting,
        prompts_per_rollout=base.prompts_per_rollout // updates,
        updates_per_rollout=1,
        steps=base.steps * updates,
        warmup_steps=base.warmup_steps * updates,
    )


def tests() -> list[Comparison]:
    """Every setting against stale, wide updates on fresh data and on stale, and the cures."""
    pairs = [("stale", setting) for setting in ("fresh", "stale-wide", "stale-half")]
    pairs.append(("stale-wide", "fresh-wide"))
    settings = [
        Comparison(setting, (base, arm), (setting, arm)) for base, setting in pairs for arm in ARMS
    ]
    wide = "stale-wide"
    cures = [Comparison("cures", (wide, "grpo"), (wide, arm)) for arm in ("gspo", *CURES)]
    return settings + cures
