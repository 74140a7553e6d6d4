"""Placement: which pass's noise hurts, and which replay helps at which staleness?

Part 1, settings noise-in-PASS: the noise of routing-noise in every pass, in the rollout, in the old
pass or in the updates alone. Arms: GRPO (8 seeds), with R2, with R3 (5 seeds).
Part 2, settings updates-M: 1, 2, 4 and 8 updates a rollout under the same noise, with 4 prompts an
update and 160 updates in all, so that only the age of the data varies. Arms: GRPO, with R2, with
R3. Seeds: 21 to 25.
Primary outcome: final reward. Tests: each placement against "all passes", each replay against none
in the same setting: exact sign-flip test, Holm's correction within a part. Of five seeds no p falls
below 0.06, so that replays are read by their intervals. Some cells are one training under two
names, as replay leaves nothing of the noise: with noise in the updates alone R2 and R3 replay the
same clean choice, with noise in the old pass alone R3 is R3 without noise, and R3 takes the noise
of old pass and updates away wherever it is. R3 with noise in the updates is not tested once more.
"""

from pathlib import Path
from typing import get_args

from moe_rl.config import RouterNoisePasses, RunConfig
from moe_rl.experiments.study import EIGHT_SEEDS, FIVE_SEEDS, Comparison, Variants, of_variants
from moe_rl.presets import preset

_GRPO: Variants = {"grpo": {}}
_REPLAY: Variants = {"grpo+R2": {"routing_replay": "R2"}, "grpo+R3": {"routing_replay": "R3"}}
_AGES = (1, 2, 4, 8)
_UPDATES = 160
_PROMPTS_PER_UPDATE = 4


def runs(root: Path) -> list[RunConfig]:
    """Both parts."""
    base = preset("routing-noise")
    configs = []
    for passes in get_args(RouterNoisePasses):
        setting = base.replace(setting=f"noise-in-{passes}", router_noise_passes=passes)
        configs += of_variants(setting, _GRPO, EIGHT_SEEDS)
        configs += of_variants(setting, _REPLAY, FIVE_SEEDS)
    for updates in _AGES:
        setting = base.replace(
            setting=f"updates-{updates}",
            updates_per_rollout=updates,
            prompts_per_rollout=_PROMPTS_PER_UPDATE * updates,
            steps=_UPDATES // updates,
            warmup_steps=base.warmup_steps * 8 // updates,
        )
        configs += of_variants(setting, {**_GRPO, **_REPLAY}, FIVE_SEEDS)
    return configs


def tests() -> list[Comparison]:
    """Each placement against all passes, each replay against none."""
    passes = [f"noise-in-{passes}" for passes in get_args(RouterNoisePasses)]
    everywhere = ("noise-in-all", "grpo")
    placed = [
        Comparison("placement", everywhere, (setting, "grpo"))
        for setting in passes
        if setting != everywhere[0]
    ]
    ages = [f"updates-{updates}" for updates in _AGES]
    replayed = [
        Comparison(family, (setting, "grpo"), (setting, arm))
        for family, settings in (("placement", passes), ("staleness", ages))
        for setting in settings
        for arm in _REPLAY
        if (setting, arm) != ("noise-in-update", "grpo+R3")
    ]
    return placed + replayed
