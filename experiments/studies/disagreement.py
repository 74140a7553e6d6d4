"""Disagreement: does GRPO fall because passes route differently, or because they disagree at all?

Router noise cannot reach a dense model, so that under it the dense control is no control. Here
noise on the last hidden states, behind all routers, lets passes disagree by as much: with equal
weights 1.2 makes a KL (k3) of about 0.06 between rollout and old pass, and 1.7 of 0.15 to 0.20,
where router noise of 0.25 makes 0.07 and of 0.35 0.21. No router changes its choice between them.
Settings: hidden-1.2 and hidden-1.7, 8 updates a rollout, no router noise. Replay is R3.
Arms: GRPO, with dual clip, over rollout log-probs, with replay, GSPO; on a dense model the same
without replay.
Seeds: 21 to 25.
Primary outcome: final reward. Tests: every arm against GRPO on the same model and seeds, and GRPO
on the dense model against GRPO on the MoE: exact sign-flip test, Holm's correction over the arms of
a model; of five seeds no p falls below 0.06, so that intervals are what is read.
If GRPO collapses on both models, disagreement is the cause and routing one of its sources; replay
cannot help then, and dual clip, rollout log-probs and GSPO should.
"""

from pathlib import Path

from moe_rl.config import RunConfig
from moe_rl.experiments.study import FIVE_SEEDS, Comparison, Variants, of_arms, of_variants
from moe_rl.presets import preset

NOISES = (1.2, 1.7)
ARMS = ("grpo", "grpo+dual-clip", "grpo+rollout-old", "grpo+replay", "gspo", "dense", "dense-gspo")
_DENSE: Variants = {
    "dense+dual-clip": {"algorithm": "dual_clip"},
    "dense+rollout-old": {"old_logprobs": "rollout"},
}


def runs(root: Path) -> list[RunConfig]:
    """The arms on both models, at both noises."""
    configs = []
    for noise in NOISES:
        base = preset("mild-stale").replace(setting=f"hidden-{noise:g}", hidden_noise=noise)
        dense = base.replace(num_experts=base.model.experts_per_token)
        configs += of_arms(base, ARMS, FIVE_SEEDS) + of_variants(dense, _DENSE, FIVE_SEEDS)
    return configs


def tests() -> list[Comparison]:
    """The arms of the dense model, and the two models."""
    settings = [f"hidden-{noise:g}" for noise in NOISES]
    cures = [
        Comparison(f"dense, {setting}", (setting, "dense"), (setting, arm))
        for setting in settings
        for arm in (*_DENSE, "dense-gspo")
    ]
    models = [Comparison("models", (setting, "grpo"), (setting, "dense")) for setting in settings]
    return cures + models
