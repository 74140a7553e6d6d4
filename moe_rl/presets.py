"""Presets: the settings that the studies compare, each a function that makes a config.

What each setting shows is in docs/results.md, how far it is from the edges of every arm in
experiments/README.md.
Importable without torch.
"""

from collections.abc import Callable
from typing import Literal

from moe_rl.config import ColdStartConfig, ModelConfig, RunConfig, TaskConfig

PresetName = Literal[
    "tiny",
    "mild-stale",
    "stale",
    "small-updates",
    "routing-noise",
    "mild-noise",
    "calibrated-noise",
]


def tiny() -> RunConfig:
    """A run of seconds, for trying things and for tests."""
    return RunConfig(
        setting="tiny",
        model=ModelConfig(
            num_layers=2,
            hidden_size=32,
            num_attention_heads=2,
            expert_size=16,
            num_experts=8,
            experts_per_token=2,
        ),
        task=TaskConfig(digits=2),
        cold_start=ColdStartConfig(
            sft_steps=100, sft_batch_size=64, sft_learning_rate=1e-2, slip=0.2
        ),
        steps=4,
        prompts_per_rollout=8,
        group_size=8,
        updates_per_rollout=4,
        warmup_steps=1,
    )


def mild_stale() -> RunConfig:
    """8 updates on one rollout, and no noise: the setting that the others vary."""
    return RunConfig(
        setting="mild-stale",
        model=ModelConfig(num_experts=32),
        steps=20,
        updates_per_rollout=8,
        learning_rate=7e-4,
    )


def stale() -> RunConfig:
    """32 updates on one rollout, as large as those of mild-stale. No noise."""
    return mild_stale().replace(setting="stale", updates_per_rollout=32, prompts_per_rollout=128)


def small_updates() -> RunConfig:
    """32 updates on one rollout, of one prompt each. No noise.

    They break runs on fresh data too, GSPO's as well (the study `staleness`).
    """
    return mild_stale().replace(setting="small-updates", updates_per_rollout=32)


def routing_noise() -> RunConfig:
    """A stress test: every pass over the same tokens chooses other experts.

    84% of routers differ between two passes; between the R3 paper's engines 10%, beside vLLM in
    bfloat16 1.5%.
    """
    return mild_stale().replace(setting="routing-noise", router_noise=0.35)


def mild_noise() -> RunConfig:
    """The same with half of the routers, which at 4 layers are the R3 paper's 94% of tokens."""
    return mild_stale().replace(setting="mild-noise", router_noise=0.135)


def calibrated_noise() -> RunConfig:
    """The same with the R3 paper's 10% of routers (arXiv 2510.11370): `moe-rl calibrate`."""
    return mild_stale().replace(setting="calibrated-noise", router_noise=0.02)


PRESETS: dict[PresetName, Callable[[], RunConfig]] = {
    "tiny": tiny,
    "mild-stale": mild_stale,
    "stale": stale,
    "small-updates": small_updates,
    "routing-noise": routing_noise,
    "mild-noise": mild_noise,
    "calibrated-noise": calibrated_noise,
}


def preset(name: PresetName) -> RunConfig:
    """The preset of that name."""
    return PRESETS[name]()
