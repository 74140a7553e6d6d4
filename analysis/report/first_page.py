"""The first page of the report: three questions and one twist, answered by the data alone."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from moe_rl.analysis.data.load import is_dense
from moe_rl.analysis.data.stats import iqm, separation
from moe_rl.analysis.plots.tails import TWIST_ARMS
from moe_rl.analysis.report.page import bounds, number, share
from moe_rl.analysis.verdicts import rules
from moe_rl.analysis.verdicts.verdicts import INCONCLUSIVE, MIN_SEEDS, NOT_REPRODUCED, REPRODUCED
from moe_rl.experiments.arms import arm_label

# Verdict -> how the first page answers "is the cure enough?" and "is it because of the MoE?".
ENOUGH = {REPRODUCED: "Enough", NOT_REPRODUCED: "Not enough", INCONCLUSIVE: "Open"}
MOE = {REPRODUCED: "Yes", NOT_REPRODUCED: "No", INCONCLUSIVE: "Open"}
QUESTIONS = (
    "Does GRPO collapse because the model is a MoE?",
    "Which cure is enough, for which disease?",
    "What would you watch?",
)
COMMITTED = Path(__file__).parent / "committed.json"
NO_CURE = "nothing to cure"  # where GRPO is stable and no arm ends above it
SHOWN_SIGNALS = 3
# Links of the chain that a run logs as it goes, and their names in a sentence.
SIGNALS = {
    "mean_ratio": "mean of w",
    "survival_10": "P(w > 10)",
    "negative_above": "unbounded branch's share of the gradient",
    "largest_token": "largest single token's share of it",
    "token_var": "variance of the token ratio",
    "token_ess": "effective sample size",
    "clip_share": "clipped share",
    "grad_norm": "gradient norm",
    "churn_last": "routing churn",
}


def answers(measures: pd.DataFrame, cures: pd.DataFrame) -> list[tuple[str, list[str]]]:
    """The questions that a reader comes with, each with its answers, a paragraph a setting.

    `measures` is `run_measures(study)`, of which incomplete runs do not count, and `cures` is
    `cures_table(measures)`, empty where there is no mild setting.
    """
    done = measures[measures["complete"]]
    settings = [(str(name), own) for name, own in done.groupby("setting", sort=False)]
    verdicts: dict[str, dict[str, str]] = {}
    for row in cures.to_dict("records"):
        verdicts.setdefault(row["setting"], {})[row["arm"]] = row["verdict"]
    causes = [_cause(name, own) for name, own in settings]
    cured = [_cures(name, own, verdicts.get(name, {})) for name, own in settings]
    told = [list(filter(None, causes)), list(filter(None, cured)), [_watch(done)]]
    return list(zip(QUESTIONS, told, strict=True))


def committed_answers() -> dict[str, list[str]]:
    """The same questions, as committed.py answers them from the studies of this repository."""
    found: dict[str, list[str]] = json.loads(COMMITTED.read_text(encoding="utf-8"))
    return found


def _cause(setting: str, runs: pd.DataFrame) -> str:
    """GRPO on the MoE against GRPO on the dense control."""
    moe, dense = (runs[runs["arm"] == arm] for arm in ("grpo", "dense"))
    if moe.empty or dense.empty:
        return ""
    finding = rules.dense_is_stable(runs)
    counts = (
        f"GRPO on the MoE ended at {_final(moe)} and was unstable in {_count(moe, 'unstable')}, "
        f"on the dense control at {_final(dense)} and in {_count(dense, 'unstable')}"
    )
    why = f" ({finding.reason})" if finding.verdict == INCONCLUSIVE else ""
    return f"{MOE[finding.verdict]} in {setting}{why}: {counts}."


def _cures(setting: str, runs: pd.DataFrame, verdicts: Mapping[str, str]) -> str:
    """Every arm on GRPO's model but restarts, judged by what it loses to the setting.

    An arm that a mild setting has too is judged by what it loses against that (`verdicts`, by arm,
    of `cures_table`), any other by what it gains over GRPO (`rules.restores`).
    """
    grpo = runs[runs["arm"] == "grpo"]
    if grpo.empty:
        return ""
    updates, experts = (grpo[name].iloc[0] for name in ("updates_per_rollout", "num_experts"))
    dense = is_dense(grpo)
    model = "a dense model, " if dense else ""
    many = "update" if updates == 1 else "updates"
    start = f"In {setting} ({model}{_disease(grpo)}, {updates:g} {many} a rollout)"
    others = (runs["arm"] != "grpo") & ~runs["arm"].str.startswith(rules.RESTARTS)
    alike = runs[(runs["num_experts"] == experts) & others]
    if not (rules.fails(runs, "grpo") or (verdicts and grpo["collapsed"].any())):
        above = _above(runs, alike["arm"].unique())
        end = f"; above it on the same seeds: {above}." if above else f": {NO_CURE}."
        stable = f"near its peak in {(~grpo['unstable']).sum()} of {len(grpo)} seeds"
        return f"{start} GRPO ended at {_final(grpo)}, {stable}{end}"
    mild = rules.mild_setting(runs)
    by_mild = f" by {mild}, within {rules.MILD_MARGIN:g} and without a collapse"
    by_gain = " by the gain over GRPO" if verdicts else ""
    judged: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for arm, own in alike.groupby("arm"):
        if arm in verdicts:
            verdict, by = verdicts[str(arm)], by_mild
        else:
            verdict, by = rules.restores(runs, str(arm)).verdict, by_gain
        judged.setdefault((verdict, by), []).append((_final(own), arm_label(str(arm))))
    parts = [
        f"{word}{by}: "
        + ", ".join(f"{label} {final}" for final, label in sorted(judged[verdict, by])[::-1])
        + "."
        for verdict, word in ENOUGH.items()
        for by in (by_mild, by_gain)
        if (verdict, by) in judged
    ]
    fell = f"collapsed in {_count(grpo, 'collapsed')}"
    sentences = [f"{start} GRPO ended at {_final(grpo)} and {fell}.", *parts, _dense_cure(runs)]
    return "\n".join(sentence for sentence in sentences if sentence)


def _disease(runs: pd.DataFrame) -> str:
    """What is done to the passes of a setting's runs."""
    names = ("router_noise", "hidden_noise", "rollout_precision")
    noise, hidden, precision = (runs[name].iloc[0] for name in names)
    if precision not in ("float32", None):
        return f"rollouts with {precision} weights"
    if noise:
        return f"passes that route differently, noise {noise:g}"
    if (hidden or 0) > 0:  # None: runs of a version without it
        return f"noise {hidden:g} on hidden states, which no router sees"
    return "no noise"


def _above(runs: pd.DataFrame, arms: Iterable[str]) -> str:
    """The arms whose gain over GRPO has an interval above `rules.MIN_EFFECT`, largest first."""
    gains = {arm: rules.restores(runs, arm).interval for arm in arms}
    above = {arm: gain for arm, gain in gains.items() if gain.low > rules.MIN_EFFECT}
    return ", ".join(
        f"{arm_label(arm)} by {gain.value:.2f} {bounds(gain.low, gain.high)}"
        for arm, gain in sorted(above.items(), key=lambda item: -item[1].value)
    )


def _dense_cure(runs: pd.DataFrame) -> str:
    """GSPO where there is no routing at all."""
    dense, cured = (runs[runs["arm"] == arm] for arm in ("dense", "dense-gspo"))
    if dense.empty or cured.empty:
        return ""
    verdict = rules.gspo_restores_dense(runs).verdict
    return (
        f"On the dense control, where nothing is routed, GSPO ended at {_final(cured)} and GRPO at "
        f"{_final(dense)}; that GSPO restores a dense model too is {verdict}."
    )


def _watch(done: pd.DataFrame) -> str:
    """The numbers in which runs that collapsed differ most from those that did not, before it."""
    scores = {}
    for name, words in SIGNALS.items():
        known = done[done[name].notna()]
        fallen = known["collapsed"].astype(bool)
        if min(fallen.sum(), (~fallen).sum()) >= MIN_SEEDS:
            scores[words] = separation(known.loc[fallen, name], known.loc[~fallen, name])
    k, n = int(done["collapsed"].sum()), len(done)
    if not scores:
        return (
            f"Not settled: {k} of {n} runs collapsed, and a comparison needs {MIN_SEEDS} that did "
            f"and {MIN_SEEDS} that did not."
        )
    order = sorted(scores, key=lambda words: -abs(scores[words] - 0.5))
    named = [
        f"{words} ({'higher' if scores[words] >= 0.5 else 'lower'}, AUC "
        f"{max(scores[words], 1 - scores[words]):.2f})"
        for words in order
    ]
    rest = f"; least in {named[-1]}" if len(named) > SHOWN_SIGNALS else ""
    return (
        f"Before their collapse the {k} runs that collapsed differ from the {n - k} others most in "
        f"{', '.join(named[:SHOWN_SIGNALS])}{rest}. This pools arms and settings and picks the "
        "best after the fact, so it ranks signals and is no test of a warning."
    )


def twist_setting(measures: pd.DataFrame) -> str | None:
    """Where one change of GRPO is compared: the first setting in which GRPO fails, else the first.

    None where GRPO was run beside none of the changes.
    """
    done = measures[measures["complete"]]
    settings = {}
    for name, own in done.groupby("setting", sort=False):
        if "grpo" in set(own["arm"]) and set(TWIST_ARMS[1:]) & set(own["arm"]):
            settings[str(name)] = rules.fails(own, "grpo")
    failing = [name for name, fails in settings.items() if fails]
    return next(iter([*failing, *settings]), None)


def twist_words(setting: str, arms: pd.DataFrame, claims: pd.DataFrame) -> str:
    """What becomes of GRPO when one thing of it is changed: the branch, or the denominator.

    `arms` and `claims` are the rows of `summarize` and `claims_table` for this setting.
    """
    rows = arms.set_index("arm").reindex([a for a in TWIST_ARMS if a in set(arms["arm"])])
    sentences = [f"In {setting} one thing of GRPO is changed and nothing else."]
    for arm, row in rows.iterrows():
        interval = bounds(row["final_low"], row["final_high"])
        sentences.append(
            f"{arm_label(str(arm))} ended at {row['final']:.2f} {interval}".rstrip()
            + f" and collapsed in {row['collapsed']} of {row['runs']}."
        )
    for column, words, print_value in (
        ("mean_ratio", "Mean w was {}.", number),
        ("survival_10", "A ratio above 10 had {} of the tokens.", lambda value: share(value, 2)),
        ("negative_above", "The unbounded branch carried {} of the gradient's mass.", share),
    ):
        values = rows[column].dropna()
        if len(values):
            listed = [f"{print_value(v)} ({arm_label(str(a))})" for a, v in values.items()]
            sentences.append(words.format(", ".join(listed)))
    keys = ["bounded_branch_holds", "sampling_denominator_holds"]
    for row in claims[claims["key"].isin(keys)].to_dict("records"):
        if math.isfinite(row["value"]):
            sentences.append(f"{row['claim']}: {row['verdict']}.")
    return " ".join(sentences)


def _final(runs: pd.DataFrame) -> str:
    return f"{float(iqm(np.asarray(runs['final'], dtype=float))):.2f}"


def _count(runs: pd.DataFrame, column: str) -> str:
    return f"{int(runs[column].sum())} of {len(runs)}"
