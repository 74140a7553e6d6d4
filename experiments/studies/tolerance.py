"""Tolerance: how much disagreement between passes does each arm stand?

Settings: routing-noise with noise 0, 0.02, 0.07, 0.135, 0.25, 0.35 and 0.49. The disagreement
that a noise makes is measured in the runs: KL k3 between engine and trainer and the share of
routers that differ, the axes on which published systems are marked.
Arms: GRPO, with dual clip, with the engine's log-probs in the denominator, with replay (R3), GSPO.
Seeds: 21 to 25.
Primary outcome: final reward. An arm tolerates a noise if its final reward there is less than 0.1
below its own at noise 0, by the paired difference's mean; its tolerance is the largest noise that
it tolerates together with all smaller ones. The plan's comparisons are these differences, to be
read by their Student's intervals over seeds; of five seeds no p falls below 0.06.
"""

from pathlib import Path

from moe_rl.config import RunConfig
from moe_rl.experiments.study import FIVE_SEEDS, Comparison, of_arms
from moe_rl.presets import preset

NOISES = (0.0, 0.02, 0.07, 0.135, 0.25, 0.35, 0.49)
ARMS = ("grpo", "grpo+dual-clip", "grpo+rollout-old", "grpo+replay", "gspo")


def runs(root: Path) -> list[RunConfig]:
    """The arms at every noise."""
    base = preset("routing-noise")
    return [
        config
        for noise in NOISES
        for config in of_arms(
            base.replace(setting=f"noise-{noise:g}", router_noise=noise),
            ARMS,
            FIVE_SEEDS,
        )
    ]


def tests() -> list[Comparison]:
    """Every noise against none, for each arm."""
    return [
        Comparison(arm, ("noise-0", arm), (f"noise-{noise:g}", arm))
        for arm in ARMS
        for noise in NOISES[1:]
    ]
