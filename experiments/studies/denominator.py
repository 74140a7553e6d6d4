"""Denominator: is it enough to divide by the probability of the policy that really sampled?

For y ~ mu and any policy pi, E[pi/mu] = 1, so that P(pi/mu > t) <= 1/t: with the sampling engine's
log-probs in the denominator a heavy right tail of the ratio is impossible, whatever routing does.
With log-probs that the trainer recomputes there is no bound.

Settings: routing-noise, int4 (the engine samples with weights rounded to int4, no noise) and
small-updates.
Arms: {recomputed, rollout} log-probs in the denominator x {open, dual clip, DPPO-TV} x {no replay,
R2, R3}; in small-updates engine and trainer agree, so that R3 is R2 and is left out, and the two
denominators are one but for rounding: its tests show what chance does. GSPO without replay, in
routing-noise and int4: the GSPO paper (5.4) says that it may take the engine's likelihoods.
Seeds, paired: 21 to 28.
Primary outcome: final reward. Tests: rollout against recomputed within each of the cells, exact
sign-flip test, Holm's correction over the three losses of a setting and a kind of replay; GSPO is a
question of its own: it tolerates the engine's likelihoods if it ends with them less than 0.1 below
GSPO with recomputed ones, by the interval, and most seeds do not collapse. Secondary, without test:
mean w, P(w > t) beside 1/t, share of the gradient's mass in the unbounded branch.
History: with replay five seeds were planned, and 26 to 28 added after all others had been read; so
was GSPO, of which the runs with recomputed log-probs in routing-noise are those of remedies.
"""

from pathlib import Path

from moe_rl.config import RoutingReplay, RunConfig
from moe_rl.experiments.study import EIGHT_SEEDS, Comparison, Variants, of_variants
from moe_rl.presets import preset

# Algorithm, and its arm over recomputed log-probs and over the engine's.
_LOSSES = {
    "grpo": ("grpo", "grpo+rollout-old"),
    "dual_clip": ("grpo+dual-clip", "grpo+dual-clip+rollout-old"),
    "dppo_tv": ("dppo-tv+recomputed-old", "dppo-tv"),
}
_GSPO = ("gspo", "gspo+rollout-old")


def runs(root: Path) -> list[RunConfig]:
    """The full factorial in three settings."""
    low = preset("mild-stale").replace(setting="int4", rollout_precision="int4")
    configs = []
    for base in (preset("routing-noise"), low, preset("small-updates")):
        for replay in _modes(base.setting):
            variants: Variants = {
                _name(arm, replay): {**changes, "algorithm": algorithm, "routing_replay": replay}
                for algorithm, arms in _LOSSES.items()
                for arm, changes in _both_denominators(arms).items()
            }
            configs += of_variants(base, variants, EIGHT_SEEDS)
        if base.setting != "small-updates":
            gspo = base.replace(algorithm="gspo")
            configs += of_variants(gspo, _both_denominators(_GSPO), EIGHT_SEEDS)
    return configs


def tests() -> list[Comparison]:
    """The engine's log-probs against recomputed ones."""
    return [
        Comparison(
            f"{setting}, replay {replay}",
            (setting, _name(recomputed, replay)),
            (setting, _name(rollout, replay)),
        )
        for setting in ("routing-noise", "int4", "small-updates")
        for replay in _modes(setting)
        for recomputed, rollout in _LOSSES.values()
    ] + [
        Comparison(f"{setting}, GSPO", (setting, _GSPO[0]), (setting, _GSPO[1]))
        for setting in ("routing-noise", "int4")
    ]


def _both_denominators(arms: tuple[str, str]) -> Variants:
    """The arm over recomputed log-probs, and over the engine's."""
    return {
        arm: {"old_logprobs": old} for arm, old in zip(arms, ("trainer", "rollout"), strict=True)
    }


def _modes(setting: str) -> tuple[RoutingReplay, ...]:
    return ("disabled", "R2") if setting == "small-updates" else ("disabled", "R2", "R3")


def _name(arm: str, replay: RoutingReplay) -> str:
    return arm if replay == "disabled" else f"{arm}+{replay}"
