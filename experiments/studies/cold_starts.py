"""Cold starts: do the results hold over initial weights and demonstrations, not over seeds alone?

All other studies train every seed from one cold start, so their intervals leave out what another
one would change. Here seed N starts from initial weights and demonstrations of its own (sft_seed
N), and so the intervals are over both.
Settings: routing-noise; small-updates. Replay is R3 under noise, R2 without it.
Arms: under noise GRPO, with dual clip, over rollout log-probs, with replay, GSPO; with small
updates GRPO, with replay, GSPO, and the dense control with GRPO and with GSPO.
Seeds: 21 to 28.
Primary outcome: final reward. Tests: every arm against GRPO on the same seeds, and with small
updates dense GSPO against dense GRPO, exact sign-flip test, Holm's correction over the arms of a
setting; the verdicts of the main claims, by the rules of all studies.
"""

from pathlib import Path

from moe_rl.config import RunConfig
from moe_rl.experiments.arms import MAIN_ARMS
from moe_rl.experiments.study import EIGHT_SEEDS, Comparison, of_arms
from moe_rl.presets import PresetName, preset

ARMS: dict[PresetName, tuple[str, ...]] = {
    "routing-noise": (*MAIN_ARMS, "grpo+dual-clip", "grpo+rollout-old"),
    "small-updates": (*MAIN_ARMS, "dense", "dense-gspo"),
}


def runs(root: Path) -> list[RunConfig]:
    """Both settings, a cold start for every seed."""
    configs = [
        config for name, arms in ARMS.items() for config in of_arms(preset(name), arms, EIGHT_SEEDS)
    ]
    return [config.replace(sft_seed=config.seed) for config in configs]


def tests() -> list[Comparison]:
    """The dense control's own cure."""
    return [Comparison("dense", ("small-updates", "dense"), ("small-updates", "dense-gspo"))]
