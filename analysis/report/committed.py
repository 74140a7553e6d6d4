"""What the committed studies answer to the questions of the first page, told beside a new study.

    python -m moe_rl.analysis.report.committed

writes committed.json, which the wheel contains, from the tables in experiments/results.
"""

from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd

from moe_rl.analysis.report.finals import RESULTS
from moe_rl.analysis.report.first_page import COMMITTED, NO_CURE, QUESTIONS, Answer, answers
from moe_rl.analysis.report.page import bounds
from moe_rl.analysis.report.pool import pool
from moe_rl.analysis.report.tables import cures_table
from moe_rl.analysis.verdicts.verdicts import STABLE
from moe_rl.analysis.warning.signals import SIGNALS
from moe_rl.analysis.warning.thresholds import read_thresholds
from moe_rl.run_folder.log import write_json

CAUSE, CURES = "staleness", "remedies"  # the studies that answer the first two questions
SIMILAR_KL = (0.25, 0.35)  # router noise that parts two passes as far as the hidden noise does


def make_answers(results: Path = RESULTS) -> list[Answer]:
    """The answers of the tables in `results` and of the committed thresholds."""
    old_data, remedies = _runs(results, CAUSE), _runs(results, CURES)
    cause, _, _ = answers(old_data, cures_table(old_data))
    _, cures, _ = answers(remedies, cures_table(remedies))
    ill = [words for words in cause.words if STABLE not in words]
    cured = [words for words in cures.words if NO_CURE not in words]
    return [
        replace(cause, words=[_routers_or_not(results), _old_data(old_data)], details=ill),
        replace(cures, words=[f"{CURES}: {words}" for words in cured]),
        Answer(QUESTIONS[2], [_watch(results)]),
    ]


def _runs(results: Path, study: str) -> pd.DataFrame:
    return pool([results / study])[0].runs


def _routers_or_not(results: Path) -> str:
    """GRPO's runs that collapse where passes disagree: over routes, or over what no router sees."""
    hidden = _of_grpo(_runs(results, "disagreement"), ["grpo", "dense"])
    routed = _of_grpo(_runs(results, "tolerance"), ["grpo"])
    routed = routed[routed["router_noise"].isin(SIMILAR_KL)]
    ended, spared = (f"{runs['collapsed'].sum()} of {len(runs)}" for runs in (routed, hidden))
    return (
        f"disagreement: where two passes disagree, yes: router noise ended {ended} runs of GRPO, "
        f"noise of a similar KL that no router sees {spared}, on the MoE and on a dense model."
    )


def _old_data(measures: pd.DataFrame) -> str:
    """The MoE beside the dense control without noise: on old data, and with small updates."""
    runs = _of_grpo(measures, ["grpo", "dense"])

    def told(*settings: str) -> list[str]:
        some = runs[runs["setting"].isin(settings)]
        arms = [some[some["arm"] == arm] for arm in ("grpo", "dense")]
        return [
            f"ends at {own['final'].mean():.2f} and collapses in {own['collapsed'].sum()} of "
            f"{len(own)}"
            for own in arms
        ]

    old, small = told("stale", "stale-again"), told("small-updates", "small-fresh")
    return (
        f"{CAUSE}: where the data are old, in part: GRPO on the MoE {old[0]} runs, on a dense "
        f"model {old[1]} (stale, and again on new seeds). With small updates, no: on the MoE it "
        f"{small[0]}, on a dense model it {small[1]}."
    )


def _of_grpo(runs: pd.DataFrame, arms: list[str]) -> pd.DataFrame:
    return runs[runs["complete"] & runs["arm"].isin(arms)]


def _watch(results: Path) -> str:
    """The best signal: on the runs that chose it, and on later ones."""
    rules = read_thresholds()
    best = max((rule for rule in rules.signals if rule.warns), key=lambda rule: rule.auc)
    later = pd.read_csv(results / "warning" / "auc_later.csv").set_index(["horizon", "signal"])
    tried = pd.read_csv(results / "warning" / "tried.csv").set_index(["setting", "signal"])
    row, alarms = later.loc[rules.horizon, best.signal], tried.loc["all", best.signal]
    within = bounds(row["within_arm_low"], row["within_arm_high"])
    chance = ", no better than chance" if row["within_arm_low"] <= 0.5 else ""
    return (
        f"warning: of the first {rules.horizon} steps the {SIGNALS[best.signal].label} tells best "
        f"(AUC {best.auc:.2f} {bounds(best.auc_low, best.auc_high)} over settings; on later seeds "
        f"{row['auc']:.2f} {bounds(row['auc_low'], row['auc_high'])}, among runs of one arm "
        f"{row['within_arm']:.2f} {within}{chance}). There its alarm came before "
        f"{alarms['hits']:.0f} of {alarms['collapses']:.0f} collapses and in "
        f"{alarms['false_alarms']:.0f} of {alarms['survivors']:.0f} runs without."
    )


if __name__ == "__main__":
    write_json(COMMITTED, [asdict(answer) for answer in make_answers()])
