"""Depth: is the failure worse in deeper models, and whose failure is it?

Settings: 2, 4 and 8 layers, each with the noise of routing-noise (noise-Ln) and without (mild-Ln).
Arms: GRPO, with replay (R3) and GSPO under noise; GRPO and the dense control without.
Seeds: 21 to 25.
Primary outcomes: churn of GRPO over a rollout in the first fifth of the steps, and final reward.
Tests: 8 against 2 layers on the same seeds, exact sign-flip test, Holm's correction over the arms;
of five seeds no p falls below 0.06, so that intervals are what is read. Churn is judged without
noise, which makes it itself. Whether the MoE loses more by depth than the dense model is read from
both intervals side by side. Limits: the learning rate is one for all depths, and at one noise a
deeper model has as large a share of routers that differ, and more of them at each token.
"""

from pathlib import Path

from moe_rl.config import RunConfig
from moe_rl.experiments.arms import MAIN_ARMS
from moe_rl.experiments.study import FIVE_SEEDS, Comparison, of_arms
from moe_rl.presets import preset

LAYERS = (2, 4, 8)
_MILD_ARMS = ("grpo", "dense")


def runs(root: Path) -> list[RunConfig]:
    """The arms at every depth; without a choice of experts there is nothing to perturb."""
    noise, mild = preset("routing-noise"), preset("mild-stale")
    configs = []
    for layers in LAYERS:
        noisy = noise.replace(setting=f"noise-L{layers}", num_layers=layers)
        clean = mild.replace(setting=f"mild-L{layers}", num_layers=layers)
        configs += of_arms(noisy, MAIN_ARMS, FIVE_SEEDS)
        configs += of_arms(clean, _MILD_ARMS, FIVE_SEEDS)
    return configs


def tests() -> list[Comparison]:
    """The deepest against the shallowest model."""
    shallow, deep = (f"L{LAYERS[place]}" for place in (0, -1))
    noisy = [(arm, "final") for arm in MAIN_ARMS]
    clean = [*((arm, "final") for arm in _MILD_ARMS), ("grpo", "churn_early")]
    return [
        Comparison(f"{kind}, {name}", (f"{kind}-{shallow}", arm), (f"{kind}-{deep}", arm), name)
        for kind, pairs in (("noise", noisy), ("mild", clean))
        for arm, name in pairs
    ]
