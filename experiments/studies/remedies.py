"""Remedies: which published cure works for which disease?

Settings: routing-noise (every pass routes differently), stale (32 updates a rollout of four prompts
each, no noise), small-updates (32 of one prompt each) and mild-stale (8 of four), each for the MoE;
all but routing-noise once more for a dense model of equal active size (stale-dense, small-dense,
mild-dense), which has no routing. Replay is R3 under noise, R2 without it.
Arms: all of experiments/arms.py; in stale without five that are GRPO itself where engine and old
pass agree; for the dense model those that do not need a router, in mild-dense, where nothing is to
be mended, the main arms alone, and in stale-dense GRPO and the arms that stale spares.
Seeds: 21 to 28 for the main arms, 21 to 25 for the others. Seeds below 21 were looked at before.
Primary outcome: final reward, the mean of the last eighth of the steps.
Tests: every arm against GRPO in the same setting on the same seeds, exact two-sided sign-flip test
of the mean difference, Student's 95% interval. Holm's correction over the arms on eight seeds of
one setting; of the others five seeds cannot bring p below 0.06, so they explore.
A cure counts as enough for a disease where its final reward is within 0.1 of the same arm's in
mild-stale (for a dense model in mild-dense, where that was run), by the interval of the paired
difference, and no seed collapses. In stale, which has four times the prompts and the updates, that
is lenient: what age costs is told by fresh, in the study staleness.
History: stale was added after three seeds of the other settings, when the study staleness had shown
that small-updates, which stood for staleness until then, is none; stale-dense after five seeds of
stale, for whether what holds there has to do with routing.
"""

from collections.abc import Sequence
from pathlib import Path

from moe_rl.config import RunConfig
from moe_rl.experiments.arms import ARMS, DENSE_ARMS, MAIN_ARMS
from moe_rl.experiments.study import EIGHT_SEEDS, FIVE_SEEDS, of_arms
from moe_rl.presets import preset

# Those that the main claims need, on all seeds.
_EIGHT = {*MAIN_ARMS, "grpo+dual-clip", "grpo+rollout-old", "dense", "dense-gspo"}
# Where engine and old pass agree these are GRPO but for rounding, as is grpo+rollout-old, which is
# run all the same and shows what chance does.
_GRPO_ITSELF = {"grpo+mean-old", "tis", "mis", "geo-rs", "icepop"}
_HOLD_IN_STALE = ("grpo", "gspo", "gspo-token", "gmpo", "positive-only")


def runs(root: Path) -> list[RunConfig]:
    """All arms in four settings, and without routing in three."""
    noise, stale, small, mild = (
        preset(name) for name in ("routing-noise", "stale", "small-updates", "mild-stale")
    )
    configs = []
    for base in (noise, stale, small, mild):
        main, others = _split([arm for arm in ARMS if base is not stale or arm not in _GRPO_ITSELF])
        configs += of_arms(base, main, EIGHT_SEEDS)
        configs += of_arms(base, others, FIVE_SEEDS)
    main, others = _split(DENSE_ARMS)
    small_dense = _dense(small, "small-dense")
    configs += of_arms(small_dense, main, EIGHT_SEEDS)
    configs += of_arms(small_dense, others, FIVE_SEEDS)
    configs += of_arms(_dense(mild, "mild-dense"), main, EIGHT_SEEDS)
    configs += of_arms(_dense(stale, "stale-dense"), _HOLD_IN_STALE, FIVE_SEEDS)
    return configs


def _dense(base: RunConfig, name: str) -> RunConfig:
    """The setting for a dense model of equal active size."""
    return base.replace(setting=name, num_experts=base.model.experts_per_token)


def _split(arms: Sequence[str]) -> tuple[list[str], list[str]]:
    """Arms on all seeds, and the others."""
    main = [arm for arm in arms if arm in _EIGHT]
    return main, [arm for arm in arms if arm not in _EIGHT]
