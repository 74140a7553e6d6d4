"""How well a signal of the first n steps tells a coming collapse.

A collapse is that of `analysis/data/collapse.py`. The score of a run is the WORST value of a signal
in its first n steps: it passes a threshold exactly when an alarm has sounded by then, so that AUC
and alarms speak of one rule; a mean would dilute one bad step by the calm ones before it.

AUC, at a horizon of n steps, is the share of pairs (a run that collapses later, a run that does
not) in which the first has the worse score; ties count half. Runs that have collapsed by step n
are left out: theirs is no forecast. Pairs are formed within a setting (`auc`), and within a
setting and an arm (`within_arm`): a signal that only recognises the arm has 0.5 there, however
well it does among arms. Only settings with 3 collapses and 3 survivors count. The setting is the
unit: the seeds of an arm resemble each other, and the next user has a setting of his own. So AUCs
are means over settings, each counting once, with Student's interval.

Alarms: one sounds at the first of n steps whose value passes a threshold, the smallest with at most
10% false alarms over all settings but one, and is tried on that one. A collapse is caught if the
alarm comes before it, whenever it comes.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moe_rl.analysis.data.collapse import outcome
from moe_rl.analysis.data.load import KEYS, StudyRuns
from moe_rl.analysis.data.stats import Interval, student_interval
from moe_rl.analysis.warning.signals import SIGNALS, STATED, Signal, signal_table
from moe_rl.config import RunConfig, flat_settings

HORIZONS = (3, 5, 8, 10)
FALSE_ALARMS = 0.1
FEWEST = 3  # collapses, and survivors, of a setting that counts
FEWEST_SETTINGS = 5  # to judge by: the interval of fewer is too wide to say anything
# What makes two settings one, whatever studies call them. A dense model is another setting.
TERMS = (
    "family", "num_layers", "num_experts", "digits", "digits_per_token", "learning_rate", "steps",
    "prompts_per_rollout", "updates_per_rollout", "router_noise", "hidden_noise",
    "router_noise_passes", "engine", "rollout_precision",
)  # fmt: skip

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class WatchedRun:
    """What the evaluation needs of one complete run."""

    setting: str
    arm: str
    seed: int
    collapse_step: float
    """NaN: it did not collapse."""
    signals: pd.DataFrame
    """See `signal_table`."""

    @property
    def collapsed(self) -> bool:
        """Whether its reward collapsed."""
        return not math.isnan(self.collapse_step)

    @cached_property
    def _columns(self) -> dict[str, Floats]:
        return {name: self.signals[name].to_numpy(float) for name in self.signals}

    @cached_property
    def _steps(self) -> Floats:
        return self.signals.index.to_numpy(float)

    def bad(self, signal: Signal, horizon: int) -> Floats:
        """The values of the first steps, times the signal's sign: larger is worse."""
        return self._columns[signal.name][self._steps < horizon] * signal.sign

    def score(self, signal: Signal, horizon: int) -> float:
        """The worst of the first values, times the sign; NaN where there is none."""
        values = self.bad(signal, horizon)
        return float(np.fmax.reduce(values)) if len(values) else math.nan

    def lead(self, signal: Signal, horizon: int, threshold: float) -> float:
        """Steps from the alarm to the collapse; inf without a collapse, NaN without an alarm."""
        values = self.bad(signal, horizon)
        steps = self._steps[: len(values)]
        end = self.collapse_step if self.collapsed else math.inf
        alarms = steps[(values > threshold * signal.sign) & (steps < end)]
        return end - float(alarms[0]) if len(alarms) else math.nan


@dataclass(frozen=True, kw_only=True)
class Auc:
    """An AUC, mean over settings, and the runs that are in a pair."""

    over_settings: Interval
    collapses: int
    survivors: int

    @property
    def enough(self) -> bool:
        """Whether enough settings have a pair."""
        return self.over_settings.n >= FEWEST_SETTINGS

    @property
    def above_chance(self) -> bool:
        """Whether enough settings have a pair, and the interval lies above one half."""
        return self.enough and self.over_settings.low > 0.5

    def columns(self, name: str) -> dict[str, float]:
        """Value, bounds and counts, by the names of `auc_table`."""
        found, counts = self.over_settings, "" if name == "auc" else f"{name}_"
        return {
            name: found.value,
            f"{name}_low": float(np.clip(found.low, 0.0, 1.0)),
            f"{name}_high": float(np.clip(found.high, 0.0, 1.0)),
            f"{counts}settings": found.n,
            f"{counts}collapses": self.collapses,
            f"{counts}survivors": self.survivors,
        }


def watched_runs(studies: Iterable[StudyRuns]) -> list[WatchedRun]:
    """The complete runs of studies, each training once, and each setting under its first name.

    Studies share runs under other names of setting and arm, and with other settings that change no
    update: counted twice, a run would be judged by a threshold that was chosen on itself. Rewards
    tell: those of two trainings are not equal at every step.
    """
    found: dict[tuple[float, ...], WatchedRun] = {}
    names: dict[tuple[Any, ...], str] = {}
    defaults = flat_settings(RunConfig().to_dict())
    for study in studies:
        steps, updates = (dict(tuple(f.groupby(KEYS))) for f in (study.steps, study.updates))
        for run in study.runs[study.runs["complete"]].to_dict("records"):
            key = (run["setting"], run["arm"], run["seed"])
            if key not in steps:
                continue
            own = steps[key]
            training = tuple(own["reward"].astype(float))
            if training in found:
                continue
            # Runs of an earlier version lack the options that have come since.
            settings = defaults | flat_settings(study.configs[key])
            setting = names.setdefault(tuple(map(settings.get, TERMS)), run["setting"])
            found[training] = WatchedRun(
                setting=setting,
                arm=run["arm"],
                seed=run["seed"],
                collapse_step=outcome(own["reward"].astype(float), own["step"]).collapse_step,
                signals=signal_table(own, updates.get(key, study.updates.iloc[:0])),
            )
    return list(found.values())


def settings_that_count(runs: Sequence[WatchedRun]) -> list[str]:
    """Settings with at least `FEWEST` collapses and as many survivors, in order of appearance."""
    counts = pd.DataFrame(
        {"setting": [r.setting for r in runs], "collapsed": [r.collapsed for r in runs]}
    )
    table = pd.crosstab(counts["setting"], counts["collapsed"]).reindex(
        index=counts["setting"].unique(), columns=[False, True], fill_value=0
    )
    return list(table.index[table.min(axis=1) >= FEWEST])


def mean_auc(runs: Sequence[WatchedRun], scores: Sequence[float], strata: Sequence[object]) -> Auc:
    """Share of pairs within a stratum in which the run that collapses has the larger score.

    Mann-Whitney's statistic over the pairs of a setting, whose strata it sums, and then the mean
    over settings; ties count half, runs with a NaN are left out.
    """
    frame = pd.DataFrame(
        {
            "setting": [run.setting for run in runs],
            "stratum": strata,
            "score": scores,
            "collapsed": [run.collapsed for run in runs],
        }
    ).dropna(subset=["score"])
    wins: dict[object, float] = {}
    pairs: dict[object, int] = {}
    collapses = survivors = 0
    for (setting, _), own in frame.groupby(["setting", "stratum"], sort=False):
        values, bad = own["score"].to_numpy(float), own["collapsed"].to_numpy(bool)
        worse, calm = values[bad][:, None], values[~bad]
        if worse.size and calm.size:
            won = float((worse > calm).sum() + 0.5 * (worse == calm).sum())
            wins[setting] = wins.get(setting, 0.0) + won
            pairs[setting] = pairs.get(setting, 0) + worse.size * calm.size
            collapses, survivors = collapses + worse.size, survivors + calm.size
    return Auc(
        over_settings=student_interval([wins[setting] / pairs[setting] for setting in wins]),
        collapses=collapses,
        survivors=survivors,
    )


def evidence(pooled: Auc, within: Auc) -> str:
    """What a signal has been shown to tell.

    run         a collapsing run from its siblings of the same arm and setting
    arm         a run of an arm that collapses from others: siblings are not told apart, or too few
    too few     less than 5 settings with a collapse and a survivor
    nothing     no better than chance
    """
    if pooled.above_chance:
        return "run" if within.above_chance else "arm"
    return "nothing" if pooled.enough else "too few"


def auc_table(runs: Sequence[WatchedRun]) -> pd.DataFrame:
    """One row a horizon and signal: AUC among the runs of a setting, and of a setting and arm."""
    rows = []
    for horizon in HORIZONS:
        ahead = [
            run for run in runs
            if len(run.signals) >= horizon and not run.collapse_step < horizon
        ]  # fmt: skip
        counted = settings_that_count(ahead)
        cases = [run for run in ahead if run.setting in counted]
        for signal in SIGNALS.values():
            scores = [run.score(signal, horizon) for run in cases]
            pooled = mean_auc(cases, scores, ["all arms"] * len(cases))
            within = mean_auc(cases, scores, [run.arm for run in cases])
            rows.append(
                {
                    "horizon": horizon,
                    "signal": signal.name,
                    "bad": signal.bad,
                    **pooled.columns("auc"),
                    **within.columns("within_arm"),
                    "evidence": evidence(pooled, within),
                }
            )
    return pd.DataFrame(rows)


def choose_threshold(signal: Signal, survivors: Sequence[float]) -> float:
    """The threshold nearest to calm with at most 10% of the survivors' scores beyond it.

    Args:
        survivors: scores of runs that do not collapse (larger is worse, NaN is left out).

    Returns:
        In the signal's own sign; NaN without a survivor.
    """
    ordered = sorted((score for score in survivors if not math.isnan(score)), reverse=True)
    if not ordered:
        return math.nan
    # Alarms sound strictly beyond it, so the survivor that sets it is silent.
    return ordered[int(FALSE_ALARMS * len(ordered))] * signal.sign


@dataclass(frozen=True, kw_only=True)
class Alarms:
    """What an alarm rule did on runs that it was not chosen on."""

    hits: int = 0
    collapses: int = 0
    false_alarms: int = 0
    survivors: int = 0
    leads: list[float] = field(default_factory=list)

    def row(self) -> dict[str, float]:
        """Counts, rates (NaN without a run) and the median lead of the hits, in steps."""
        return {
            "hits": self.hits,
            "collapses": self.collapses,
            "hit_rate": self.hits / self.collapses if self.collapses else math.nan,
            "false_alarms": self.false_alarms,
            "survivors": self.survivors,
            "false_alarm_rate": self.false_alarms / self.survivors if self.survivors else math.nan,
            "median_lead": float(np.median(self.leads)) if self.leads else math.nan,
        }


def try_alarm(runs: Sequence[WatchedRun], signal: Signal, horizon: int, threshold: float) -> Alarms:
    """Sound alarms over runs; those that did not log the signal are left out."""
    known = [run for run in runs if not math.isnan(run.score(signal, horizon))]
    leads = [(run.collapsed, run.lead(signal, horizon, threshold)) for run in known]
    caught = [lead for collapsed, lead in leads if collapsed and not math.isnan(lead)]
    collapses = sum(run.collapsed for run in known)
    return Alarms(
        hits=len(caught),
        collapses=collapses,
        false_alarms=sum(not collapsed and not math.isnan(lead) for collapsed, lead in leads),
        survivors=len(known) - collapses,
        leads=caught,
    )


def _counted(runs: Sequence[WatchedRun]) -> list[WatchedRun]:
    settings = settings_that_count(runs)
    return [run for run in runs if run.setting in settings]


def thresholds_of(runs: Sequence[WatchedRun], horizon: int) -> dict[str, float]:
    """The threshold of every signal, chosen on all settings that count."""
    calm = [run for run in _counted(runs) if not run.collapsed]
    return {
        name: choose_threshold(signal, [run.score(signal, horizon) for run in calm])
        for name, signal in SIGNALS.items()
    }


def leave_one_out(runs: Sequence[WatchedRun]) -> pd.DataFrame:
    """One row a horizon, signal and setting left out: a threshold of the others tried on it.

    The last row of a signal, with `left_out` "all", sums the others up. No rows for a signal that
    fewer than two settings have: nothing is left to choose a threshold on.
    """
    counted = _counted(runs)
    settings = list(dict.fromkeys(run.setting for run in counted))
    rows = []
    for horizon in HORIZONS:
        for signal in SIGNALS.values():
            scores = [(run, run.score(signal, horizon)) for run in counted]
            known = [(run, score) for run, score in scores if not math.isnan(score)]
            tried: list[Alarms] = []
            for setting in settings:
                calm = [s for run, s in known if run.setting != setting and not run.collapsed]
                threshold = choose_threshold(signal, calm)
                own = [run for run, _ in known if run.setting == setting]
                if math.isnan(threshold) or not own:
                    continue
                alarms = try_alarm(own, signal, horizon, threshold)
                tried.append(alarms)
                key = {"horizon": horizon, "signal": signal.name, "left_out": setting}
                rows.append(key | {"threshold": threshold} | alarms.row())
            if tried:
                whole = Alarms(
                    hits=sum(a.hits for a in tried),
                    collapses=sum(a.collapses for a in tried),
                    false_alarms=sum(a.false_alarms for a in tried),
                    survivors=sum(a.survivors for a in tried),
                    leads=[lead for a in tried for lead in a.leads],
                )
                key = {"horizon": horizon, "signal": signal.name, "left_out": "all"}
                rows.append(key | {"threshold": math.nan} | whole.row())
    columns = ["horizon", "signal", "left_out", "threshold", *Alarms().row()]
    return pd.DataFrame(rows, columns=columns)


def stated_table(runs: Sequence[WatchedRun]) -> pd.DataFrame:
    """One row a horizon and published threshold: what it does on all settings that count."""
    counted = _counted(runs)
    rows = [
        {"horizon": horizon} | vars(stated)
        | try_alarm(counted, SIGNALS[stated.signal], horizon, stated.threshold).row()
        for horizon in HORIZONS
        for stated in STATED
    ]  # fmt: skip
    return pd.DataFrame(rows)


def tried_table(
    runs: Sequence[WatchedRun], thresholds: Mapping[str, float], horizon: int
) -> pd.DataFrame:
    """One row a signal and setting: what a threshold of the signal does on its runs.

    The last row of a signal, with setting "all", counts the runs of all settings: as nothing is
    chosen here, those without a collapse or a survivor too. No row of a signal whose threshold is
    NaN.
    """
    groups: dict[str, list[WatchedRun]] = {}
    for run in runs:
        groups.setdefault(run.setting, []).append(run)
    rows = []
    for name, threshold in thresholds.items():
        if math.isnan(threshold):
            continue
        for setting, own in [*groups.items(), ("all", list(runs))]:
            alarms = try_alarm(own, SIGNALS[name], horizon, threshold)
            key = {"horizon": horizon, "signal": name, "setting": setting, "threshold": threshold}
            rows.append(key | alarms.row())
    return pd.DataFrame(rows)
