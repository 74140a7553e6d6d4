"""What the committed studies answer to the questions of the first page, told beside a new study.

    python -m moe_rl.analysis.report.committed

writes committed.json, which the wheel contains, from the tables in experiments/results.
"""

from pathlib import Path

from moe_rl.analysis.report.finals import RESULTS
from moe_rl.analysis.report.first_page import COMMITTED, NO_CURE, QUESTIONS, answers
from moe_rl.analysis.report.page import bounds
from moe_rl.analysis.report.pool import pool
from moe_rl.analysis.report.tables import cures_table
from moe_rl.analysis.verdicts.verdicts import STABLE
from moe_rl.analysis.warning.signals import SIGNALS
from moe_rl.analysis.warning.thresholds import read_thresholds
from moe_rl.run_folder.log import write_json

CAUSE, CURES = "staleness", "remedies"  # the studies that answer the first two questions


def make_answers(results: Path = RESULTS) -> dict[str, list[str]]:
    """Question -> paragraphs, from the tables in `results` and the committed thresholds."""
    cause, cures, watch = QUESTIONS
    return {
        cause: _answers(results, CAUSE, cause),
        cures: _answers(results, CURES, cures),
        watch: [_watch()],
    }


def _answers(results: Path, study: str, question: str) -> list[str]:
    """What one study says to one question, but where GRPO is stable and nothing is to be cured."""
    measures = pool([results / study])[0].runs
    said = dict(answers(measures, cures_table(measures)))[question]
    return [f"{study}: {words}" for words in said if STABLE not in words and NO_CURE not in words]


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
    write_json(COMMITTED, make_answers())
