"""Precision: what do rollouts in other numerics do?

Settings: the engine samples with weights in float32 (the trainer's own), bf16, fp8, int8 or int4;
8 updates a rollout, no noise.
Arms: GRPO and GSPO, each over recomputed log-probs and over the engine's; GRPO with R3 over both.
Seeds: 21 to 25.
Primary outcome: final reward. Tests: each precision against float32 within an arm, exact sign-flip
test, Holm's correction over the precisions; of five seeds no p falls below 0.06, so that intervals
are what is read. Secondary: KL k3 and router disagreement between
engine and trainer, and the part of that KL which replay removes.
History: GSPO over the engine's log-probs, and R3 over them, were added after the others were read.
"""

from pathlib import Path

from moe_rl.config import RunConfig
from moe_rl.experiments.study import FIVE_SEEDS, Comparison, Variants, of_variants
from moe_rl.presets import preset

PRECISIONS = ("float32", "bf16", "fp8", "int8", "int4")
ARMS: Variants = {
    "grpo": {},
    "grpo+rollout-old": {"old_logprobs": "rollout"},
    "grpo+R3": {"routing_replay": "R3"},
    "grpo+rollout-old+R3": {"old_logprobs": "rollout", "routing_replay": "R3"},
    "gspo": {"algorithm": "gspo"},
    "gspo+rollout-old": {"algorithm": "gspo", "old_logprobs": "rollout"},
}


def runs(root: Path) -> list[RunConfig]:
    """The arms at every precision."""
    base = preset("mild-stale")
    return [
        config
        for precision in PRECISIONS
        for config in of_variants(
            base.replace(setting=precision, rollout_precision=precision), ARMS, FIVE_SEEDS
        )
    ]


def tests() -> list[Comparison]:
    """Each precision against float32."""
    return [
        Comparison(arm, ("float32", arm), (precision, arm))
        for arm in ARMS
        for precision in PRECISIONS[1:]
    ]
