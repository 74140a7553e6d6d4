"""Staleness: is what breaks runs without noise the age of the data, or small updates?

32 updates on the rollout of mild-stale change three things: the data are older, an update has one
prompt in place of four, and there are 640 updates in place of 160, at the same learning rate. All
settings here have 640, so that their number is held and not studied:
stale: 32 updates a rollout, of four prompts each; fresh: the same on a rollout of its own for each;
small-updates: 32 updates a rollout, of one prompt each; small-fresh: the same on a rollout of its
own for each; small-half: small-updates at half the learning rate.
The schedules are one but for this: the rate is constant within a rollout, so that on fresh data it
rises more smoothly, to 0.81 of that of stale in the mean over the warm-up (0.90 over all updates).
stale-slower is stale at 0.8 of the rate, for what that difference may do.
stale-again is stale on sixteen new seeds, for what eight left open: whether part of what old data
cost GRPO is routing's.
Arms: GRPO and GSPO, on the MoE and on the dense control; in stale also GRPO with replay (R2), with
dual clip and over rollout log-probs, and with two tighter clips: GSPO's clip takes a third of the
tokens out of the gradient, GRPO's one in a hundred. If that brake is GSPO's cure, GRPO has it too
with a range of 0.02 (high 0.027) or of GSPO's own numbers, 3e-4 and 4e-4. In stale-slower GRPO; in
stale-again GRPO, with replay, and on the dense control.
Seeds: 21 to 25; in stale and fresh 21 to 28, with the tighter clips 21 to 25; in stale-again 29 to
44.
Primary outcome: final reward. Tests: small-fresh, small-half and stale against small-updates, and
fresh against stale, for each of the four arms; stale-slower against stale for GRPO; the cures
against GRPO are those of every report. Exact sign-flip test, Holm's correction over the arms of a
setting; of five seeds no p falls below 0.06, so that there the intervals are what is read. Age is
what breaks small-updates if small-fresh ends above it by more than 0.1 in the mean for GRPO and for
dense GRPO, and stale does not. It costs an arm of larger updates what fresh ends above stale and
stale-slower.
stale-again is read once, when all its runs are complete, and its seeds are not pooled with those of
stale. Part of what age costs is routing's if replay ends above GRPO there (p below 0.05 after
Holm's correction over replay and the dense control): on fresh data replay changes nothing, as old
pass and update are one. If the dense control alone does, the MoE ends lower, for whatever reason.
If neither does, the question stays open, and the intervals say how large either can be; where the
true difference is the +0.29 of the first eight seeds, sixteen find it in about six of ten such
studies.
History: stale and its cures were added after small-fresh had been seen to fall, fresh after five
seeds of stale, seeds 26 to 28 after three seeds of both, then the tighter clips, then stale-slower,
and stale-again after all of these, where replay had +0.29 [-0.15, 0.72] and the dense control +0.33
over GRPO.
"""

from pathlib import Path

from moe_rl.config import RunConfig
from moe_rl.experiments.study import (
    EIGHT_SEEDS,
    FIVE_SEEDS,
    Comparison,
    Variants,
    of_arms,
    of_variants,
)
from moe_rl.presets import preset

ARMS = ("grpo", "gspo", "dense", "dense-gspo")
CURES = ("grpo+replay", "grpo+dual-clip", "grpo+rollout-old")
ROUTING = ("grpo", "grpo+replay", "dense")
SIXTEEN_SEEDS = tuple(range(29, 45))
CLIPS: Variants = {
    "grpo+clip-0.02": {"clip_low": 0.02, "clip_high": 0.027},
    "grpo+clip-3e-4": {"clip_low": 3e-4, "clip_high": 4e-4, "allow_any_clip_scale": True},
}


def runs(root: Path) -> list[RunConfig]:
    """The arms in every setting."""
    small, stale = preset("small-updates"), preset("stale")
    half = small.replace(setting="small-half", learning_rate=small.learning_rate / 2)
    configs = []
    for setting in (_fresh(stale, "fresh"), stale):
        configs += of_arms(setting, ARMS, EIGHT_SEEDS)
    configs += of_arms(stale, CURES, EIGHT_SEEDS)
    configs += of_variants(stale, CLIPS, FIVE_SEEDS)
    slower = stale.replace(setting="stale-slower", learning_rate=0.8 * stale.learning_rate)
    configs += of_arms(slower, ["grpo"], FIVE_SEEDS)
    again = stale.replace(setting="stale-again")
    configs += of_arms(again, ROUTING, SIXTEEN_SEEDS)
    for setting in (_fresh(small, "small-fresh"), small, half):
        configs += of_arms(setting, ARMS, FIVE_SEEDS)
    return configs


def _fresh(base: RunConfig, setting: str) -> RunConfig:
    """The same updates and warm-up, each update on a rollout of its own."""
    updates = base.updates_per_rollout
    return base.replace(
        setting=setting,
        prompts_per_rollout=base.prompts_per_rollout // updates,
        updates_per_rollout=1,
        steps=base.steps * updates,
        warmup_steps=base.warmup_steps * updates,
    )


def tests() -> list[Comparison]:
    """What fresh data, larger updates and a smaller rate change."""
    pairs = [("small-updates", other) for other in ("small-fresh", "stale", "small-half")]
    pairs.append(("stale", "fresh"))
    settings = [
        Comparison(f"{other} against {base}", (base, arm), (other, arm))
        for base, other in pairs
        for arm in ARMS
    ]
    slower = Comparison("stale-slower against stale", ("stale", "grpo"), ("stale-slower", "grpo"))
    return [*settings, slower]
