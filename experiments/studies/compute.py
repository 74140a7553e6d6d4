"""Compute: does GSPO converge faster at equal compute?

Settings: mild-stale and calibrated-noise, each at two budgets, 20 and 40 rollout steps
(-20, -40; the learning rate decays over the budget).
Arms: GRPO, with replay (R2 without noise, R3 with it), GSPO.
Seeds: 21 to 28.
Primary outcome: held-out pass@1, the mean over 64 prompts and 32 samples each, at the end of a
budget, as the GSPO paper scores; beside it the floating-point operations spent up to each
evaluation. Tests: GSPO against each other arm at each budget, exact sign-flip test, Holm's
correction over the arms of a setting.
"""

from pathlib import Path

from moe_rl.config import RunConfig
from moe_rl.experiments.arms import MAIN_ARMS
from moe_rl.experiments.study import EIGHT_SEEDS, Comparison, of_arms
from moe_rl.presets import PresetName, preset

_PRESETS: tuple[PresetName, ...] = ("mild-stale", "calibrated-noise")
_BUDGETS = (20, 40)  # rollout steps


def runs(root: Path) -> list[RunConfig]:
    """The arms at both budgets."""
    configs = []
    for name in _PRESETS:
        for steps in _BUDGETS:
            base = preset(name).replace(setting=f"{name}-{steps}", steps=steps, evaluate_every=5)
            configs += of_arms(base, MAIN_ARMS, EIGHT_SEEDS)
    return configs


def tests() -> list[Comparison]:
    """GSPO against every other arm."""
    settings = [f"{name}-{steps}" for name in _PRESETS for steps in _BUDGETS]
    return [
        Comparison(setting, (setting, arm), (setting, "gspo"), outcome="pass_at_1")
        for setting in settings
        for arm in MAIN_ARMS
        if arm != "gspo"
    ]
