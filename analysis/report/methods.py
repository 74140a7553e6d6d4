"""Analysis room: the methods section of the report, with the constants that the code uses."""

from __future__ import annotations

from moe_rl.analysis.data.collapse import FINAL_FRACTION, STABLE_DRAWDOWN, WINDOWS_PER_RUN
from moe_rl.analysis.data.stats import EXACT_SIGN_FLIPS, LEVEL, RESAMPLES, RNG_SEED
from moe_rl.analysis.report.page import Html, join, tag
from moe_rl.analysis.verdicts.verdicts import MIN_SEEDS

ENTRIES = [
    (
        "Smoothing",
        f"Trailing mean over a window of max(1, steps // {WINDOWS_PER_RUN}) rollout steps; used "
        "for peak and collapse only, figures show the raw reward. A non-finite reward counts as 0.",
    ),
    (
        "Collapse",
        "The smoothed reward falls under half its running peak and stays there to the end of the "
        "run; the time of collapse is the first step from which it does.",
    ),
    (
        "Final reward, peak, drawdown, deepest fall",
        f"Final: mean over the last 1/{FINAL_FRACTION} of the steps. Peak: maximum of the smoothed "
        "reward. Drawdown: (peak \u2212 final) / peak, at least 0. Unstable: drawdown above "
        f"{STABLE_DRAWDOWN:.0%}. Deepest fall: the largest share by which the smoothed reward lies "
        "below its running peak at any step, also where it comes back.",
    ),
    (
        "Stability frontier",
        "The largest learning rate whose median drawdown over seeds is at most "
        f"{STABLE_DRAWDOWN:.0%}, every smaller rate tried being stable too; per arm, updates per "
        "rollout and router noise.",
    ),
    (
        "Statistics over seeds",
        "The seed is the unit. Final rewards: interquartile mean (drop floor(n/4) runs at each "
        f"end) with a {LEVEL:.0%} percentile bootstrap over seeds, {RESAMPLES} resamples, fixed "
        f"generator seed {RNG_SEED}. Verdicts rest on Student's interval of a mean over seeds and "
        f"Wilson's of a fraction of seeds, none of fewer than {MIN_SEEDS}. Neither is exact for "
        "what runs do: where one seed in seven collapses and the others agree, Student's 95% "
        "covers 73% at 8 seeds. Nothing is corrected for the number of verdicts.",
    ),
    (
        "Paired tests",
        "Differences of final reward between arms on the same seeds: mean with Student's "
        "interval over pairs, and a two-sided sign-flip permutation test, exact up to "
        f"{EXACT_SIGN_FLIPS} seeds.",
    ),
    (
        "Churn",
        "Mean over response tokens and layers of |new experts \\ old experts| / K. By router: "
        "share of (token, layer) whose sets differ. By token: share of tokens with at least one "
        "layer that differs; it grows with depth and must not be compared between depths.",
    ),
    (
        "Ratios",
        "log w = logprob \u2212 old_logprob of a token; the sequence ratio is exp of its mean over "
        "the response. Raw, before any clamp. ESS/N = 1/(1 + CV\u00b2).",
    ),
    (
        "Routing part and weight part",
        "log w = [log p_new(live) \u2212 log p_new(replayed)] + [log p_new(replayed) \u2212 log "
        "p_old]. Shares are each term of Var(log w) = Var(routing) + Var(weight) + 2 Cov over the "
        "sum, summed over a run's sampled updates; they may leave 0 to 1 where the parts oppose "
        "each other.",
    ),
    (
        "Window of the chain",
        "Churn, ratio variance, clip share, gradient norm and routing share in tables and claims "
        "are taken over the steps before the collapse, over the whole run where there is none.",
    ),
    (
        "Verdicts",
        "Computed from the interval by the rule printed with each claim: reproduced when the whole "
        "interval satisfies it, not reproduced when none of it does, else inconclusive. Incomplete "
        "runs count in no statistic.",
    ),
]


def methods_section() -> Html:
    """Every definition and statistical method that the report uses."""
    return tag("dl", join([join([tag("dt", name), tag("dd", words)]) for name, words in ENTRIES]))
