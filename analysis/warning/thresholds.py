"""The thresholds that watch a run, as `moe-rl warning` writes and `moe-rl watch` reads them."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd

from moe_rl.analysis.data.load import AnalysisError, decode
from moe_rl.analysis.data.stats import student_interval
from moe_rl.analysis.warning.evaluate import WatchedRun, settings_that_count, thresholds_of
from moe_rl.analysis.warning.signals import SIGNALS
from moe_rl.config import SCHEMA
from moe_rl.run_folder.log import write_json

COMMITTED = Path(__file__).parent / "thresholds.json"


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """A signal's threshold, and what it has meant in the studies it was chosen on."""

    signal: str
    bad: str
    threshold: float
    auc: float
    auc_low: float
    auc_high: float
    within_arm: float
    within_arm_low: float
    within_arm_high: float
    evidence: str
    """See `evaluate.evidence`."""
    hits: int
    """Of `collapses`, in settings left out of the choice."""
    collapses: int
    false_alarms: int
    """Of `survivors`, in settings left out of the choice."""
    survivors: int
    gain_low: float
    """Lower bound of Student's 95% interval, over the settings left out, of the share of collapses
    that are caught minus the share of false alarms."""
    median_lead: float
    """Steps from the alarm to the collapse."""

    @property
    def warns(self) -> bool:
        """Whether an alarm of it means anything.

        The signal does better than chance, and its thresholds did on settings that they were not
        chosen on: more alarms in collapses than in survivors. A signal can order the runs of every
        setting and still have no threshold that carries over.
        """
        return self.evidence in ("run", "arm") and self.gain_low > 0


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Thresholds for the first `horizon` steps of a run."""

    horizon: int
    studies: list[str]
    runs: int
    settings: list[str]
    signals: list[Threshold]

    def write(self, file: Path) -> None:
        """Write them as `read_thresholds` reads them."""
        write_json(file, {"schema": SCHEMA} | asdict(self))


def make_thresholds(
    runs: Sequence[WatchedRun],
    studies: list[str],
    horizon: int,
    aucs: pd.DataFrame,
    left_out: pd.DataFrame,
) -> Thresholds:
    """The thresholds of one horizon, from the tables of `auc_table` and `leave_one_out`."""
    chosen = thresholds_of(runs, horizon)
    counts = ["hits", "collapses", "false_alarms", "survivors"]
    own = left_out[left_out["horizon"] == horizon]
    whole = own[own["left_out"] == "all"]
    each = own[own["left_out"] != "all"]
    gains = (each["hit_rate"] - each["false_alarm_rate"]).groupby(each["signal"])
    gain_low = {name: student_interval(values).low for name, values in gains}
    tried = whole.set_index("signal").reindex(list(SIGNALS))
    tried[counts] = tried[counts].astype(float).fillna(0).astype(int)
    ours = aucs[aucs["horizon"] == horizon].set_index("signal")
    names = [f.name for f in fields(Threshold) if f.name in ours and f.name not in tried]
    settings = settings_that_count(runs)
    return Thresholds(
        horizon=horizon,
        studies=studies,
        runs=sum(run.setting in settings for run in runs),
        settings=settings,
        signals=[
            Threshold(
                signal=name,
                threshold=chosen[name],
                median_lead=float(tried.loc[name, "median_lead"]),
                hits=int(tried.loc[name, "hits"]),
                collapses=int(tried.loc[name, "collapses"]),
                false_alarms=int(tried.loc[name, "false_alarms"]),
                survivors=int(tried.loc[name, "survivors"]),
                gain_low=gain_low.get(name, math.nan),
                **ours.loc[name, names].to_dict(),
            )
            for name in SIGNALS
        ],
    )


def read_thresholds(file: Path = COMMITTED) -> Thresholds:
    """Thresholds that `moe-rl warning` wrote; the committed ones by default.

    Raises:
        AnalysisError: not such a file.
    """
    try:
        values: dict[str, Any] = decode(json.loads(file.read_text(encoding="utf-8")))
        if values.pop("schema") != SCHEMA:
            raise ValueError("another format version")
        signals = [Threshold(**row) for row in values.pop("signals") if row["signal"] in SIGNALS]
        found = Thresholds(**values, signals=signals)
        numbers = [found.horizon, *(rule.threshold for rule in signals)]
        if not signals or not all(isinstance(number, int | float) for number in numbers):
            raise ValueError("no signal of ours, or a horizon or threshold that is no number")
        return found
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise AnalysisError(
            f"thresholds={str(file)!r}: no thresholds ({error}); `moe-rl warning` writes them"
        ) from error
