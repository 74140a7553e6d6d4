"""Families: does the story hold in other MoE families than Qwen3-MoE?

Settings: routing-noise on small models of OLMoE, Mixtral, DeepSeek-V3 and GPT-OSS, at the learning
rate of the Qwen3-MoE, tuned for none of them, and each at the noise at which 84% of routers differ
between two passes of its cold start, as there (`moe-rl calibrate --share 0.84`). Replay is R3.
Arms: GRPO, with dual clip, with replay, GSPO, GSPO with replay.
Seeds: 21 to 25.
Primary outcome: final reward. Tests: every arm against GRPO on the same seeds, exact sign-flip
test, Holm's correction over the arms of a family; and GSPO with replay against GSPO. Of five seeds
no p falls below 0.06, so that intervals are what is read. KL between engine and trainer stands
beside it: equal shares of routers need not move the log-probs equally.
History: planned at the noise of the Qwen3-MoE. After one seed, where that was 70% of OLMoE's
routers and no failure, and 91% of DeepSeek-V3's and the end of GSPO too, equal shares came instead.
GSPO with replay was added after three seeds, in which GSPO collapsed in Mixtral and GPT-OSS and
GRPO with replay did not: does GSPO need replay there?
"""

from pathlib import Path

from moe_rl.config import Family, RunConfig
from moe_rl.experiments.study import FIVE_SEEDS, Comparison, of_arms
from moe_rl.presets import preset

NOISES: dict[Family, float] = {
    "olmoe": 0.55,
    "mixtral": 0.376,
    "deepseek_v3": 0.26,
    "gpt_oss": 0.36,
}
ARMS = ("grpo", "grpo+dual-clip", "grpo+replay", "gspo", "gspo+replay")


def runs(root: Path) -> list[RunConfig]:
    """The arms in every family."""
    base = preset("routing-noise")
    return [
        config
        for family, noise in NOISES.items()
        for config in of_arms(
            base.replace(setting=family, family=family, router_noise=noise), ARMS, FIVE_SEEDS
        )
    ]


def tests() -> list[Comparison]:
    """Does GSPO need replay?"""
    return [
        Comparison("replay under GSPO", (family, "gspo"), (family, "gspo+replay"))
        for family in NOISES
    ]
