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
    cause, _, _ = _answers(results, CAUSE)
    _, cures, _ = _answers(results, CURES)
    ill = [words for words in cause.words if STABLE not in words]
    cured = [words for words in cures.words if NO_CURE not in words]
    joined = f"disagreement: {_routers_or_not(results)}"
    return [
        replace(cause, words=[joined, *(f"{CAUSE}: {words}" for words in ill)]),
        replace(cures, words=[f"{CURES}: {words}" for words in cured]),
        Answer(QUESTIONS[2], [_watch()]),
    ]


def _answers(results: Path, study: str) -> list[Answer]:
    measures = pool([results / study])[0].runs
    return answers(measures, cures_table(measures))


def _routers_or_not(results: Path) -> str:
    """GRPO's runs that collapse where passes disagree: over routes, or over what no router sees."""
    hidden = _of_grpo(results, "disagreement", ["grpo", "dense"])
    routed = _of_grpo(results, "tolerance", ["grpo"])
    routed = routed[routed["router_noise"].isin(SIMILAR_KL)]
    ended, spared = (f"{runs['collapsed'].sum()} of {len(runs)}" for runs in (routed, hidden))
    return (
        f"where two passes disagree, routing ends GRPO: router noise ended {ended} runs, noise of "
        f"a similar KL behind all routers {spared}, MoE and dense. Where the data are old it "
        "depends on the setting, and a dense model can fall as the MoE does:"
    )


def _of_grpo(results: Path, study: str, arms: list[str]) -> pd.DataFrame:
    runs = pool([results / study])[0].runs
    return runs[runs["complete"] & runs["arm"].isin(arms)]


def _watch() -> str:
    rules = read_thresholds()
    best = max((rule for rule in rules.signals if rule.warns), key=lambda rule: rule.auc)
    return (
        f"warning: of the first {rules.horizon} steps the {SIGNALS[best.signal].label} "
        f"tells best (AUC {best.auc:.2f} {bounds(best.auc_low, best.auc_high)} over "
        f"settings); on settings left out its alarm came before {best.hits} of {best.collapses} "
        f"collapses and in {best.false_alarms} of {best.survivors} runs without."
    )


if __name__ == "__main__":
    write_json(COMMITTED, [asdict(answer) for answer in make_answers()])
