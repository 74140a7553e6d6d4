"""The first page of the report: three questions and one twist, answered by the data alone."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from pydantic import TypeAdapter

from moe_rl.analysis.data.load import is_dense
from moe_rl.analysis.data.stats import separation
from moe_rl.analysis.plots.tails import TWIST_ARMS
from moe_rl.analysis.report.page import bounds, number, share
from moe_rl.analysis.verdicts import rules
from moe_rl.analysis.verdicts.verdicts import INCONCLUSIVE, MIN_SEEDS, NOT_REPRODUCED, REPRODUCED
from moe_rl.experiments.arms import arm_label

# Verdict -> the answer to "is it because of the MoE?".
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


@dataclass(frozen=True)
class Cell:
    """What becomes of one arm in one setting."""

    final: float  # mean of the final reward over seeds, to which every collapse counts
    verdict: str = ""  # REPRODUCED where the arm is enough; none for GRPO, which is to be cured
    by_gain: bool = False  # judged by the gain over GRPO, as the mild setting lacks the arm


@dataclass(frozen=True)
class Cures:
    """Which arm is enough for which disease: a column a setting in which GRPO fails."""

    settings: list[str]
    rows: list[tuple[str, list[Cell | None]]]  # arm and its cells; None: not run there
    mild: bool  # arms are compared with themselves in a mild setting


@dataclass(frozen=True)
class Answer:
    """What a study says to one question."""

    question: str
    words: list[str]  # a paragraph a setting
    cures: Cures | None = None
    details: list[str] = field(default_factory=list)  # folded away


def answers(measures: pd.DataFrame, cures: pd.DataFrame) -> list[Answer]:
    """The questions that a reader comes with, each with its answers.

    `measures` is `run_measures(study)`, of which incomplete runs do not count, and `cures` is
    `cures_table(measures)`, empty where there is no mild setting.
    """
    done = measures[measures["complete"]]
    settings = [(str(name), own) for name, own in done.groupby("setting", sort=False)]
    verdicts: dict[str, dict[str, str]] = {}
    for row in cures.to_dict("records"):
        verdicts.setdefault(row["setting"], {})[row["arm"]] = row["verdict"]
    causes = [_cause(name, own) for name, own in settings]
    fates = [_fate(name, own, verdicts.get(name, {})) for name, own in settings]
    columns = {name: _column(own, verdicts.get(name, {})) for name, own in settings}
    cause, cure, watch = QUESTIONS
    return [
        Answer(cause, list(filter(None, causes))),
        Answer(cure, list(filter(None, fates)), _cures(columns, bool(verdicts))),
        Answer(watch, [_watch(done)]),
    ]


def committed_answers() -> dict[str, Answer]:
    """The same questions, as committed.py answers them from the studies of this repository."""
    found = TypeAdapter(list[Answer]).validate_json(COMMITTED.read_bytes())
    return {answer.question: answer for answer in found}


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
    return f"{MOE[finding.verdict]} in {setting}, {_circumstances(moe)}: {counts}{why}."


def _fate(setting: str, runs: pd.DataFrame, verdicts: Mapping[str, str]) -> str:
    """What is wrong in a setting, what became of GRPO there, and what of a dense model."""
    grpo = runs[runs["arm"] == "grpo"]
    if grpo.empty:
        return ""
    start = f"In {setting} ({_circumstances(grpo)})"
    if not _is_ill(runs, verdicts):
        above = _above(runs, _compared(runs)["arm"].unique())
        end = f"; above it on the same seeds: {above}." if above else f": {NO_CURE}."
        stable = f"near its peak in {(~grpo['unstable']).sum()} of {len(grpo)} seeds"
        return f"{start} GRPO ended at {_final(grpo)}, {stable}{end}"
    fell = f"{start} GRPO ended at {_final(grpo)} and collapsed in {_count(grpo, 'collapsed')}."
    return f"{fell} {_dense_cure(runs)}".rstrip()


def _is_ill(runs: pd.DataFrame, verdicts: Mapping[str, str]) -> bool:
    """Where GRPO fails, or one of its runs collapses beside a mild setting, there is a disease."""
    grpo = runs[runs["arm"] == "grpo"]
    return rules.fails(runs, "grpo") or bool(verdicts and grpo["collapsed"].any())


def _compared(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs of other arms on GRPO's model, but those that start again from a checkpoint."""
    experts = runs.loc[runs["arm"] == "grpo", "num_experts"]
    others = (runs["arm"] != "grpo") & ~runs["arm"].str.startswith(rules.RESTARTS)
    return runs[others & runs["num_experts"].isin(experts)]


def _column(runs: pd.DataFrame, verdicts: Mapping[str, str]) -> dict[str, Cell]:
    """Every arm on GRPO's model, judged; nothing where there is nothing to cure.

    An arm that a mild setting has too is judged by what it loses against that (`verdicts`, by arm,
    of `cures_table`), any other by what it gains over GRPO (`rules.restores`).
    """
    grpo = runs[runs["arm"] == "grpo"]
    if grpo.empty or not _is_ill(runs, verdicts):
        return {}
    cells = {"grpo": Cell(float(grpo["final"].mean()))}
    for arm, own in _compared(runs).groupby("arm"):
        name = str(arm)
        verdict = verdicts.get(name) or rules.restores(runs, name).verdict
        cells[name] = Cell(float(own["final"].mean()), verdict, by_gain=name not in verdicts)
    return cells


def _cures(columns: Mapping[str, Mapping[str, Cell]], mild: bool) -> Cures | None:
    """The columns side by side; arms that are enough most often come first, below GRPO."""
    ill = {setting: cells for setting, cells in columns.items() if len(cells) > 1}
    rows = {
        arm: [cells.get(arm) for cells in ill.values()]
        for arm in dict.fromkeys(arm for cells in ill.values() for arm in cells)
    }

    def merit(arm: str) -> tuple[bool, int, int, float]:
        cells = [cell for cell in rows[arm] if cell]
        said = [cell.verdict for cell in cells]
        mean = sum(cell.final for cell in cells) / len(cells)
        return arm == "grpo", said.count(REPRODUCED), -said.count(NOT_REPRODUCED), mean

    order = sorted(rows, key=merit, reverse=True)
    return Cures(list(ill), [(arm, rows[arm]) for arm in order], mild) if ill else None


def _circumstances(runs: pd.DataFrame) -> str:
    updates = runs["updates_per_rollout"].iloc[0]
    model = "a dense model, " if is_dense(runs) else ""
    many = "update" if updates == 1 else "updates"
    return f"{model}{_disease(runs)}, {updates:g} {many} a rollout"


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
    """GSPO where there is no routing at all, and GRPO fails."""
    dense, cured = (runs[runs["arm"] == arm] for arm in ("dense", "dense-gspo"))
    if cured.empty or not rules.fails(runs, "dense"):
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
    if _heavier_and_holds(rows):
        sentences.append(
            "With dual clip the ratios have the heavier tail and the run holds: what ends GRPO is "
            "what a large ratio weighs, not that it is there."
        )
    keys = ["bounded_branch_holds", "sampling_denominator_holds"]
    for row in claims[claims["key"].isin(keys)].to_dict("records"):
        if math.isfinite(row["value"]):
            sentences.append(f"{row['claim']}: {row['verdict']}.")
    return " ".join(sentences)


def _heavier_and_holds(rows: pd.DataFrame) -> bool:
    """Dual clip keeps its runs over ratios that are larger in the mean than those of GRPO."""
    if not {"grpo", "grpo+dual-clip"} <= set(rows.index):
        return False
    grpo, bounded = rows.loc["grpo"], rows.loc["grpo+dual-clip"]
    holds = bounded["collapsed"] == 0 and grpo["collapsed"] == grpo["runs"]
    return bool(holds and bounded["mean_ratio"] > grpo["mean_ratio"])


def _final(runs: pd.DataFrame) -> str:
    return f"{runs['final'].mean():.2f}"


def _count(runs: pd.DataFrame, column: str) -> str:
    return f"{int(runs[column].sum())} of {len(runs)}"
