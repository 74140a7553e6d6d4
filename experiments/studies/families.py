"""Families: does the story hold in other MoE families than Qwen3-MoE?

Settings: routing-noise on small models of OLMoE, Mixtral, DeepSeek-V3 and GPT-OSS, at the learning
rate and the noise of the Qwen3-MoE, tuned for none of them. Replay is R3.
Arms: GRPO, with dual clip, with replay, GSPO.
Seeds: 21 to 25.
Primary outcome: final reward. Tests: every arm against GRPO on the same seeds, exact sign-flip
test, Holm's correction over the arms of a family; of five seeds no p falls below 0.06, so that
intervals are what is read.
"""

from pathlib import Path

from moe_rl.config import Family, RunConfig
from moe_rl.experiments.study import FIVE_SEEDS, of_arms
from moe_rl.presets import preset

FAMILIES: tuple[Family, ...] = ("olmoe", "mixtral", "deepseek_v3", "gpt_oss")
ARMS = ("grpo", "grpo+dual-clip", "grpo+replay", "gspo")


def runs(root: Path) -> list[RunConfig]:
    """The arms in every family."""
    base = preset("routing-noise")
    return [
        config
        for family in FAMILIES
        for config in of_arms(base.replace(setting=family, family=family), ARMS, FIVE_SEEDS)
    ]
