"""The thresholds that watch a run, as `moe-rl warning` writes and `moe-rl watch` reads them."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd
from scipy import stats

from moe_rl.analysis.data.load import AnalysisError, decode
from moe_rl.analysis.data.stats import LEVEL
from moe_rl.analysis.warning.evaluate import WatchedRun, settings_that_count, thresholds_of
from moe_rl.analysis.warning.signals import SIGNALS
from moe_rl.config import SCHEMA
from moe_rl.run_folder.log import write_json

COMMITTED = Path(__file__).parent / "thresholds.json"
ENOUGH_SETTINGS = 5  # below, one odd setting decides what the others are judged by


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
    median_lead: float
    """Steps from the alarm to the collapse."""

    @property
    def warns(self) -> bool:
        """Whether an alarm of it means anything.

        The signal does better than chance, and its thresholds did on settings that they were not
        chosen on: more alarms in collapses than in survivors, by Fisher's exact test. A signal can
        order the runs of every setting and still have no threshold that carries over.
        """
        if self.evidence not in ("run", "arm") or not min(self.collapses, self.survivors):
            return False
        silent = self.collapses - self.hits, self.survivors - self.false_alarms
        table = [[self.hits, self.false_alarms], silent]
        return bool(stats.fisher_exact(table, alternative="greater").pvalue < 1 - LEVEL)


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Thresholds for the first `horizon` steps of a run."""

    horizon: int
    studies: list[str]
    runs: int
    settings: list[str]
    preliminary: bool
    """Chosen on fewer than `ENOUGH_SETTINGS` settings."""
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
    whole = left_out[(left_out["horizon"] == horizon) & (left_out["left_out"] == "all")]
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
        preliminary=len(settings) < ENOUGH_SETTINGS,
        signals=[
            Threshold(
                signal=name,
                threshold=chosen[name],
                median_lead=float(tried.loc[name, "median_lead"]),
                hits=int(tried.loc[name, "hits"]),
                collapses=int(tried.loc[name, "collapses"]),
                false_alarms=int(tried.loc[name, "false_alarms"]),
                survivors=int(tried.loc[name, "survivors"]),
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
        return Thresholds(**values, signals=signals)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise AnalysisError(
            f"thresholds={str(file)!r}: no thresholds ({error}); `moe-rl warning` writes them"
        ) from error
