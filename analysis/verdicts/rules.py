"""The rules by which the claims are judged, one function a claim.

Each takes the rows of `run_measures` for the complete runs of one setting (for a claim with `alike`
in `claims.py` of all settings that agree in those columns) and returns a `Judgement`. The docstring
IS the rule: the report prints it. Final rewards are compared between arms on the same seeds.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from moe_rl.analysis.data.load import is_dense
from moe_rl.analysis.data.stats import student_interval
from moe_rl.analysis.verdicts.verdicts import (
    INCONCLUSIVE,
    MAJORITY,
    MIN_SEEDS,
    NOT_JUDGED,
    NOT_REPRODUCED,
    STABLE,
    Judgement,
    both,
    judge_fraction,
    judge_interval,
    seeds,
)
from moe_rl.experiments.arms import arm_label

MIN_EFFECT = 0.05  # a difference of final reward (share of prompts solved) that matters
KEPT = 0.8  # share of replay's gain; non-inferiority trials ask for half or more
PAPER_CHURN = 0.10  # GSPO paper (arXiv 2507.18071), 5.3: "roughly 10% of the experts activated"
CHURN_FACTOR = 2.0  # "about": within a factor of two
CLIP_ORDERS = 1.5  # log10; nearer to two orders of magnitude (or more) than to one
MILD_MARGIN = 0.1  # of final reward; the plan of experiments/studies/remedies.py
MAX_COST = 1.05  # GSPO's operations over GRPO's that still count as equal compute
MIN_LENGTHS = 1.5  # longest over shortest mean response, from which a slope can be read
NOISES = ("router_noise", "hidden_noise")
# What settings of two depths have in common.
ALIKE = ("learning_rate", "updates_per_rollout", "router_noise", "hidden_noise", "num_experts")
# And settings of several response lengths; coarser tokens are other tokens, not fewer.
ALIKE_BUT_LENGTH = (*ALIKE, "num_layers", "digits_per_token")
# GRPO started again from before or after its collapse, with half the learning rate or the whole.
RESTART_ARM, OTHER_RESTARTS = "before-half-rate", ("before-same", "after-half-rate", "after-same")
RESTARTS = ("before-", "after-")  # how the names of all of them begin


def grpo_collapses(runs: pd.DataFrame) -> Judgement:
    """Share of grpo seeds that collapse: reproduced when its Wilson interval is above 1/2. Not
    judged for a dense model, which the claim is not about.
    """
    return _unless_dense(_collapse_share(runs, "grpo", majority=True), runs)


def replay_restores(runs: pd.DataFrame) -> Judgement:
    """Final reward of grpo+replay minus grpo, same seeds: reproduced when the interval of the mean
    is above 0.05 and most grpo+replay seeds do not collapse. Where grpo itself ends within 20% of
    its peak in most seeds, there is nothing to restore: inconclusive.
    """
    return restores(runs, "grpo+replay")


def bounded_branch_holds(runs: pd.DataFrame) -> Judgement:
    """Final reward of grpo+dual-clip minus grpo, same seeds: reproduced when the interval of the
    mean is above 0.05 and most grpo+dual-clip seeds do not collapse. Dual clip bounds the branch
    A < 0 with w above the clip range and nothing else. Where grpo itself ends within 20% of its
    peak in most seeds, there is nothing to restore: inconclusive.
    """
    return restores(runs, "grpo+dual-clip")


def sampling_denominator_holds(runs: pd.DataFrame) -> Judgement:
    """Final reward of grpo+rollout-old minus grpo, same seeds: reproduced when the interval of the
    mean is above 0.05 and most grpo+rollout-old seeds do not collapse. Only the denominator of the
    ratio differs. Where grpo itself ends within 20% of its peak in most seeds, there is nothing to
    restore: inconclusive.
    """
    return restores(runs, "grpo+rollout-old")


def gspo_needs_none(runs: pd.DataFrame) -> Judgement:
    """gspo keeps at least four fifths of what replay gives: of the gain in final reward over grpo
    that gspo+replay has (grpo+replay where that was not run), same seeds: reproduced when the
    interval of the mean of gain(gspo) - 0.8 gain(replay) is above 0 and most gspo seeds do not
    collapse. Where grpo without replay ends within 20% of its peak in most seeds, replay is needed
    by nobody: inconclusive.
    """
    other = "gspo+replay" if len(_arm(runs, "gspo+replay")) else "grpo+replay"
    pairs = _pairs(runs, "grpo", other, "gspo", column="final")
    gain, replay_gain = pairs["gspo"] - pairs["grpo"], pairs[other] - pairs["grpo"]
    finding = judge_interval(student_interval(gain - KEPT * replay_gain), low=0.0)
    verdict, reason = both(finding, _collapse_share(runs, "gspo", majority=False))
    if finding.interval.n and not fails(runs, "grpo"):
        verdict, reason = INCONCLUSIVE, f"GRPO {STABLE}: no arm needs replay"
    ours = f"gain over GRPO {gain.mean():+.2f}, {arm_label(other)} {replay_gain.mean():+.2f}"
    return _with_ours(replace(finding, verdict=verdict, reason=reason), ours)


def churn_after_one_update(runs: pd.DataFrame) -> Judgement:
    """Churn of grpo one optimiser step after the old policy: reproduced when its interval lies
    within a factor of two of 10% (5% to 20%). The paper's literal reading. Not judged under router
    noise, which makes the churn, nor for a dense model.
    """
    return _churn(runs, "churn_one")


def churn_over_rollout(runs: pd.DataFrame) -> Judgement:
    """Churn of grpo at the last update of a rollout: reproduced when its interval lies within a
    factor of two of 10% (5% to 20%). The loose reading: new against old policy, all updates. Not
    judged under router noise, which makes the churn, for a dense model, nor where a rollout has one
    update, whose pass is the old policy's.
    """
    finding = _churn(runs, "churn_last")
    if finding.interval.n and (_arm(runs, "grpo")["updates_per_rollout"] == 1).all():
        return _not_judged(finding, "one update a rollout")
    return finding


def routing_drives_ratio(runs: pd.DataFrame) -> Judgement:
    """Share of Var(log w) of grpo that is due to routing: reproduced when its interval is above
    one half. Not judged under noise, which is put into one of the parts, nor for a dense model.
    """
    interval = student_interval(_arm(runs, "grpo")["routing_share"].astype(float))
    finding = _unless_dense(_unless_noise(judge_interval(interval, low=0.5), runs), runs)
    return _with_ours(finding, f"{interval.value:.0%} of the variance")


def gspo_clips_more(runs: pd.DataFrame) -> Judgement:
    """log10 of clipped share, gspo over grpo+replay (over grpo where that was not run), same
    seeds: reproduced when the interval of the mean is above 1.5, nearer to two orders than to one.
    Seeds in which the other arm clips nothing have no ratio and are left out.
    """
    other = "grpo+replay" if len(_arm(runs, "grpo+replay")) else "grpo"
    pairs = _pairs(runs, other, "gspo", column="clip_share")
    pairs = pairs[(pairs > 0).all(axis=1)]
    orders = student_interval(np.log10(pairs["gspo"]) - np.log10(pairs[other]))
    ours = (
        f"{pairs['gspo'].median():.2g} against {pairs[other].median():.2g} ({arm_label(other)}): "
        f"{orders.value:.1f} orders"
    )
    return _with_ours(judge_interval(orders, low=CLIP_ORDERS), ours)


def replay_removes_routing(runs: pd.DataFrame) -> Judgement:
    """log10 of Var(w), the token ratio's variance that the loss sees, grpo over grpo+replay, same
    seeds: reproduced when the interval of the mean is above log10(2), more than half of it gone.
    The routing share of grpo's Var(log w), given beside it, is what replay can remove.
    """
    pairs = _pairs(runs, "grpo", "grpo+replay", column="token_var")
    pairs = pairs[(pairs > 0).all(axis=1) & np.isfinite(pairs).all(axis=1)]
    orders = student_interval(np.log10(pairs["grpo"]) - np.log10(pairs["grpo+replay"]))
    ours = (
        f"Var(w) {pairs['grpo+replay'].median():.2g} against {pairs['grpo'].median():.2g}: "
        f"{orders.value:.1f} orders"
    )
    share = _arm(runs, "grpo")["routing_share"].astype(float).median()
    if math.isfinite(share):
        ours += f"; routing share {share:.0%}"
    return _with_ours(judge_interval(orders, low=math.log10(2)), ours)


def tolerates_engine_likelihoods(runs: pd.DataFrame) -> Judgement:
    """Final reward of gspo+rollout-old, whose denominator is the engine's log-probs, minus gspo,
    same seeds: reproduced when the interval of the mean is above -0.1 and most gspo+rollout-old
    seeds do not collapse. Not judged where engine and trainer are one but for rounding.
    """
    finding = _reward_gain(runs, "gspo", "gspo+rollout-old", low=-MILD_MARGIN)
    own = _arm(runs, "gspo+rollout-old")
    exact = own["rollout_precision"].fillna("float32") == "float32"
    if finding.interval.n and exact.all() and not _noisy(own, NOISES).any():
        return _not_judged(finding, "engine and trainer agree here")
    return finding


def gspo_restores_dense(runs: pd.DataFrame) -> Judgement:
    """GSPO mends what has no routing to mend: final reward of dense-gspo minus dense, same seeds,
    without noise: reproduced when the interval of the mean is above 0.05 and most dense-gspo seeds
    do not collapse. Where the dense control itself ends within 20% of its peak in most seeds, there
    is nothing to restore: inconclusive.
    """
    return _unless_noise(restores(runs, "dense-gspo", "dense"), runs, arm="dense")


def sequence_variance_falls(study_runs: pd.DataFrame) -> Judgement:
    """Slope of log Var(s), the sequence ratio's variance, against log response length over the grpo
    runs of one seed that are equal in all else: reproduced when the interval of the mean over seeds
    is below 0. Independent tokens would give -1. Needs mean lengths that differ by a factor of 1.5.
    Runs with noise do not count: it is drawn for each token, and falls by itself.
    """
    runs = _quiet(study_runs, "grpo", *NOISES)
    slopes: list[float] = []
    for _, own in runs.groupby([*ALIKE_BUT_LENGTH, "seed"], dropna=False):
        points = own[["response_length", "sequence_var"]].astype(float)
        points = points[(points > 0).all(axis=1) & np.isfinite(points).all(axis=1)]
        lengths = points["response_length"]
        if len(points) and lengths.max() >= MIN_LENGTHS * lengths.min():
            log_length, log_variance = np.log(points.to_numpy()).T
            slopes.append(float(np.polyfit(log_length, log_variance, 1)[0]))
    interval = student_interval(slopes)
    return _with_ours(judge_interval(interval, high=0.0), f"slope {interval.value:+.2f}")


def gspo_converges_faster(runs: pd.DataFrame) -> Judgement:
    """Held-out pass@1 of gspo minus grpo+replay (minus grpo where that was not run) at the end of
    one budget of steps, same seeds: reproduced when the interval of the mean is above 0 and gspo
    spent at most 5% more floating-point operations; not judged where it spent more.
    """
    other = "grpo+replay" if len(_arm(runs, "grpo+replay")) else "grpo"
    pairs = _pairs(runs, other, "gspo", column="pass_at_1")
    gain = student_interval(pairs["gspo"] - pairs[other])
    cost = _pairs(runs, other, "gspo", column="operations").mean()
    finding = judge_interval(gain, low=0.0)
    if gain.n and not cost["gspo"] <= MAX_COST * cost[other]:
        finding = _not_judged(finding, "GSPO spent more operations, or none were counted")
    ours = f"pass@1 {gain.value:+.2f} at {cost['gspo'] / cost[other]:.2f} times the operations"
    return _with_ours(finding, ours)


def dense_is_stable(runs: pd.DataFrame) -> Judgement:
    """The failure belongs to the MoE: reproduced when most grpo seeds are unstable (final more
    than 20% below the peak) and most dense seeds are not, by Wilson intervals against 1/2; not
    reproduced when most dense seeds are unstable too; inconclusive where grpo is stable. A run that
    falls and comes back counts as stable: the median deepest fall stands beside it. Not judged
    under router noise, which cannot reach a dense model.
    """
    finding = _control(runs, "dense")
    return _unless_noise(finding, runs, "router_noise", why="router noise cannot reach it")


def frozen_router_is_stable(runs: pd.DataFrame) -> Judgement:
    """Router updates cause the failure: reproduced when most grpo seeds are unstable (final more
    than 20% below the peak) and most frozen-router seeds are not, by Wilson intervals against
    1/2; not reproduced when most frozen-router seeds are unstable too; inconclusive where grpo is
    stable.
    """
    return _control(runs, "frozen-router")


def deeper_is_worse(study_runs: pd.DataFrame) -> Judgement:
    """Churn of grpo over a rollout in the first fifth of the steps, deepest minus shallowest model,
    same seeds and everything else equal: reproduced when the interval of the mean is above 0. The
    same steps for both, as churn follows the learning rate. Needs runs at two depths, and without
    router noise, which makes churn itself.
    """
    runs = _quiet(study_runs, "grpo", "router_noise").dropna(subset="churn_early")
    gaps: list[float] = []
    for _, group in runs.groupby(list(ALIKE), dropna=False):
        depths = sorted(group["num_layers"].dropna().unique())
        if len(depths) < 2:
            continue
        by_depth = group.pivot_table(index="seed", columns="num_layers", values="churn_early")
        gaps += list((by_depth[depths[-1]] - by_depth[depths[0]]).dropna())
    if not gaps:
        return Judgement(verdict=INCONCLUSIVE, reason="not measured: needs grpo runs at two depths")
    interval = student_interval(gaps)
    finding = judge_interval(interval, low=0.0)
    return _with_ours(finding, f"early churn {interval.value:+.1%}, deepest - shallowest")


def collapse_is_irreversible(runs: pd.DataFrame) -> Judgement:
    """Of the grpo seeds that collapsed, the share whose restart from a checkpoint before the
    collapse, at half the learning rate (arm before-half-rate), ends below half of the peak that
    grpo had reached: reproduced when its Wilson interval is above 1/2. Seeds that did not collapse,
    or had by then, say nothing and are left out. The other restarts of GRPO, at the whole rate and
    from after the collapse, are given beside it: they tell what a fresh optimiser alone does.
    """
    least = least_of_restarts(runs)
    counts = {}
    for arm in (RESTART_ARM, *OTHER_RESTARTS):
        own = _arm(runs, arm)
        own = own[own["seed"].isin(least.index)]
        counts[arm] = int((own["final"] < own["seed"].map(least)).sum()), len(own)
    low, count = counts.pop(RESTART_ARM)
    if not count:
        reason = f"not measured: needs restarts (arm {RESTART_ARM}) of runs that collapsed"
        return Judgement(verdict=INCONCLUSIVE, reason=reason)
    finding = judge_fraction(low, count, majority=True, what="restart below half of the peak")
    beside = [f"{arm} {k} of {n}" for arm, (k, n) in counts.items() if n]
    return _with_ours(finding, "; ".join([f"{low} of {count} below half of the peak", *beside]))


def least_of_restarts(runs: pd.DataFrame) -> pd.Series:
    """By seed of the grpo runs that collapsed after their restarts' step, half of their peak: a
    restart that ends below it has not come back.
    """
    grpo, again = _arm(runs, "grpo"), _arm(runs, RESTART_ARM)
    # A restart makes the steps that were left.
    started = grpo["steps"].max() - again["steps"].max()
    fallen = grpo[grpo["collapsed"].astype(bool) & ~(grpo["collapse_step"] < started)]
    return fallen.set_index("seed")["peak"] / 2


def restores(runs: pd.DataFrame, arm: str, baseline: str = "grpo") -> Judgement:
    """Does an arm give back what the baseline lost: above it by more than MIN_EFFECT, on the same
    seeds, and most seeds do not collapse; inconclusive where the baseline is stable.
    """
    finding = _reward_gain(runs, baseline, arm, low=MIN_EFFECT)
    if not finding.interval.n:
        needed = f"{arm_label(baseline)} and {arm_label(arm)}"
        return replace(finding, reason=f"not measured: needs both {needed} on the same seeds")
    if not fails(runs, baseline):
        reason = f"{arm_label(baseline)} {STABLE}: there is nothing to restore"
        return replace(finding, verdict=INCONCLUSIVE, reason=reason)
    return finding


def keeps(runs: pd.DataFrame, mild: pd.DataFrame, arm: str) -> Judgement:
    """Does an arm lose nothing to a disease: its final reward in a setting is within MILD_MARGIN of
    its own in the mild setting `mild`, on the same seeds, and no seed collapses.
    """
    column = pd.concat([_arm(runs, arm).assign(arm="hard"), _arm(mild, arm).assign(arm="mild")])
    pairs = _pairs(column, "mild", "hard", column="final")
    finding = judge_interval(student_interval(pairs["hard"] - pairs["mild"]), low=-MILD_MARGIN)
    k = int(_arm(runs, arm)["collapsed"].sum())
    if k and finding.interval.n >= MIN_SEEDS:
        return replace(finding, verdict=NOT_REPRODUCED, reason=f"{seeds(k)} collapsed")
    return finding


def mild_setting(runs: pd.DataFrame) -> str | None:
    """The setting without a disease that `keeps` compares the runs of a setting with, for its
    model; None for the runs of that setting itself.
    """
    name = "mild-dense" if is_dense(_arm(runs, "grpo")) else "mild-stale"
    return None if (runs["setting"] == name).all() else name


def fails(runs: pd.DataFrame, arm: str) -> bool:
    """Whether most seeds of an arm are unstable."""
    return bool(_arm(runs, arm)["unstable"].mean() > MAJORITY)


def _arm(runs: pd.DataFrame, arm: str) -> pd.DataFrame:
    return runs[runs["arm"] == arm]


def _noisy(runs: pd.DataFrame, names: Sequence[str]) -> pd.Series:
    """Whether noise is added to the passes of a run; configs older than a kind of it lack it."""
    return (runs[list(names)].astype(float) > 0).any(axis=1)


def _quiet(runs: pd.DataFrame, arm: str, *noises: str) -> pd.DataFrame:
    own = _arm(runs, arm)
    return own[~_noisy(own, noises)]


def _pairs(runs: pd.DataFrame, *arms: str, column: str) -> pd.DataFrame:
    """`column` of the arms, one row a seed that all of them have."""
    own = runs[runs["arm"].isin(arms)]
    table = own.pivot_table(index="seed", columns="arm", values=column, dropna=False)
    return table.reindex(columns=list(arms)).astype(float).dropna()


def _reward_gain(runs: pd.DataFrame, baseline: str, arm: str, *, low: float) -> Judgement:
    """Final reward above the baseline's by more than `low`, and most seeds do not collapse."""
    pairs = _pairs(runs, baseline, arm, column="final")
    gain = judge_interval(student_interval(pairs[arm] - pairs[baseline]), low=low)
    verdict, reason = both(gain, _collapse_share(runs, arm, majority=False))
    ours = f"{arm_label(arm)} minus {arm_label(baseline)}: {gain.interval.value:+.2f}"
    return _with_ours(replace(gain, verdict=verdict, reason=reason), ours)


def _collapse_share(runs: pd.DataFrame, arm: str, *, majority: bool) -> Judgement:
    own = _arm(runs, arm)
    k = int(own["collapsed"].sum())
    finding = judge_fraction(k, len(own), majority=majority, what=f"{arm_label(arm)} collapsed")
    return _with_ours(finding, f"{k} of {len(own)} collapsed")


def _churn(runs: pd.DataFrame, column: str) -> Judgement:
    interval = student_interval(_arm(runs, "grpo")[column].astype(float))
    low, high = PAPER_CHURN / CHURN_FACTOR, PAPER_CHURN * CHURN_FACTOR
    finding = judge_interval(interval, low=low, high=high)
    finding = _unless_noise(finding, runs, "router_noise", why="router noise makes it")
    return _with_ours(_unless_dense(finding, runs), f"{interval.value:.1%}")


def _unless_noise(
    finding: Judgement,
    runs: pd.DataFrame,
    *noises: str,
    arm: str = "grpo",
    why: str = "noise makes it",
) -> Judgement:
    """What the noise itself makes, or cannot reach, says nothing about training."""
    if finding.interval.n == 0 or not _noisy(_arm(runs, arm), noises or NOISES).any():
        return finding
    return _not_judged(finding, f"{why} here")


def _unless_dense(finding: Judgement, runs: pd.DataFrame) -> Judgement:
    """Where nothing is routed a claim about routing is not at stake."""
    return _not_judged(finding, "the model is dense") if is_dense(_arm(runs, "grpo")) else finding


def _not_judged(finding: Judgement, why: str) -> Judgement:
    return replace(finding, verdict=INCONCLUSIVE, reason=f"{NOT_JUDGED}: {why}")


def _control(runs: pd.DataFrame, arm: str) -> Judgement:
    moe, control = _arm(runs, "grpo"), _arm(runs, arm)
    k, k_moe = int(control["unstable"].sum()), int(moe["unstable"].sum())
    stable = judge_fraction(k, len(control), majority=False, what=f"{arm_label(arm)} unstable")
    failing = judge_fraction(k_moe, len(moe), majority=True, what="GRPO unstable")
    if stable.interval.n == 0 or failing.interval.n == 0:
        missing = arm if stable.interval.n == 0 else "grpo"
        reason = f"not measured: no complete run of {arm_label(missing)}"
        return Judgement(verdict=INCONCLUSIVE, reason=reason)
    ours = f"unstable: {arm_label(arm)} {k} of {len(control)}, GRPO {k_moe} of {len(moe)}"
    falls = (runs["deepest_fall"].median() for runs in (control, moe))
    ours += "; deepest fall {:.0%}, {:.0%}".format(*falls)
    if stable.verdict == NOT_REPRODUCED:
        verdict, reason = NOT_REPRODUCED, stable.reason
    elif failing.verdict == NOT_REPRODUCED:
        verdict, reason = INCONCLUSIVE, f"GRPO {STABLE}: no failure to explain"
    else:
        verdict, reason = both(stable, failing)
    return Judgement(verdict=verdict, reason=reason, ours=ours, interval=stable.interval)


def _with_ours(finding: Judgement, ours: str) -> Judgement:
    if math.isnan(finding.interval.value):
        ours = "not measured"
    return replace(finding, ours=ours)
