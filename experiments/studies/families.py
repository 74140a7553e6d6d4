"""Families: does the story hold in other MoE families than Qwen3-MoE?

Settings: routing-noise on small models of OLMoE, Mixtral, DeepSeek-V3 and GPT-OSS, at the learning
rate of the Qwen3-MoE, tuned for none of them, and each at the noise at which 84% of routers differ
between two passes of its cold start, as there (`moe-rl calibrate --share 0.84`). Replay is R3.
mixtral-again and gpt_oss-again are two of them on new seeds: does GSPO need replay there?
Arms: GRPO, with dual clip, with replay, GSPO; GSPO with replay. In the last two settings those with
replay, and GSPO.
Seeds: 21 to 25; in the last two settings 26 to 33.
Primary outcome: final reward. Tests: GRPO's cures and GSPO against GRPO on the same seeds, exact
sign-flip test, Holm's correction over the arms of a family; of five seeds no p falls below 0.06, so
that intervals are what is read. KL between engine and trainer stands beside it: equal shares of
routers need not move the log-probs equally. In the last two settings GSPO with replay against GSPO,
Holm's correction over the two: GSPO needs replay in a family if that ends above it (p below 0.05),
read once, when all runs are complete.
History: planned at the noise of the Qwen3-MoE. After one seed, where that was 70% of OLMoE's
routers and no failure, and 91% of DeepSeek-V3's and the end of GSPO too, equal shares came instead.
GSPO with replay and the last two settings were added after three seeds, in which GSPO collapsed in
Mixtral and GPT-OSS and GRPO with replay did not.
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
AGAIN: tuple[Family, ...] = ("mixtral", "gpt_oss")
AGAIN_ARMS = ("grpo+replay", "gspo", "gspo+replay")
NEW_SEEDS = tuple(range(26, 34))


def runs(root: Path) -> list[RunConfig]:
    """The arms in every family."""
    base = preset("routing-noise")
    settings = {
        family: base.replace(setting=family, family=family, router_noise=noise)
        for family, noise in NOISES.items()
    }
    configs = [config for own in settings.values() for config in of_arms(own, ARMS, FIVE_SEEDS)]
    for family in AGAIN:
        again = settings[family].replace(setting=f"{family}-again")
        configs += of_arms(again, AGAIN_ARMS, NEW_SEEDS)
    return configs


def tests() -> list[Comparison]:
    """Does GSPO need replay?"""
    return [
        Comparison(
            "replay under GSPO", (f"{family}-again", "gspo"), (f"{family}-again", "gspo+replay")
        )
        for family in AGAIN
    ]
