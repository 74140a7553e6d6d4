"""Irreversibility: can a run be saved after its collapse, or from before it?

Setting: routing-noise with a noise of 0.25, where GRPO learns before it falls. Arms: GRPO, which
saves its policy every 4 steps; restarts of it from step 4, before the collapse, and from its end,
after it. Each restart makes the 16 steps that were left at step 4, with a fresh optimiser: as it
was, at half the rate, with GSPO, replay (R3), dual clip, or without noise.
Seeds: 21 to 28: at this noise about two of three runs collapse, and the others say nothing.
Primary outcome: final reward of the restart, on the seeds whose GRPO run collapsed. A collapse is
called irreversible if the 95% Wilson interval of the share of restarts that end below half of the
original's peak lies above 1/2. No correction: each kind of restart is its own question.
"""

from pathlib import Path

from moe_rl.config import RunConfig
from moe_rl.experiments.runner import run_folder
from moe_rl.experiments.study import EIGHT_SEEDS, Variants, of_arms
from moe_rl.presets import preset

_NOISE = 0.25
_BEFORE, _STEPS = 4, 16


def runs(root: Path) -> list[RunConfig]:
    """Every original with its restarts."""
    base = preset("routing-noise").replace(setting="noise-0.25", router_noise=_NOISE)
    ways: Variants = {
        "same": {},
        "half-rate": {"learning_rate": base.learning_rate / 2},
        "gspo": {"algorithm": "gspo"},
        "replay": {"routing_replay": "R3"},
        "dual-clip": {"algorithm": "dual_clip"},
        "no-noise": {"router_noise": 0.0},
    }
    configs = []
    for original in of_arms(base.replace(save_every=_BEFORE), ["grpo"], EIGHT_SEEDS):
        folder = run_folder(root, original)
        configs.append(original)
        for when, step in (("before", _BEFORE), ("after", original.steps)):
            start = original.replace(
                checkpoint=str(folder / f"policy_{step:05d}"), steps=_STEPS, save_every=0
            )
            configs += [
                start.replace(arm=f"{when}-{way}", **changes) for way, changes in ways.items()
            ]
    return configs
