"""The verdict on one run, finished or running, from the lines that it has logged so far."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from moe_rl.analysis.data.collapse import outcome
from moe_rl.analysis.warning.signals import SIGNALS, signal_table
from moe_rl.analysis.warning.thresholds import Threshold, Thresholds


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The worst value of a signal so far, beside its threshold."""

    rule: Threshold
    value: float
    """NaN: the run does not log it."""

    @property
    def passed(self) -> bool:
        """Whether the value is beyond the threshold."""
        sign = SIGNALS[self.rule.signal].sign
        return self.value * sign > self.rule.threshold * sign

    @property
    def usable(self) -> bool:
        """Whether the run logs it, and an alarm of it means anything."""
        return self.rule.warns and not math.isnan(self.value)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the first steps of a run foretell."""

    steps: int
    """Steps that have ended."""
    horizon: int
    readings: list[Reading]
    fallen_since: float
    """Step since which the reward is below half of its peak; NaN: it is not."""

    @property
    def alarm(self) -> Threshold | None:
        """The deciding signal, where it is beyond its threshold."""
        return alarm(self.readings)

    @property
    def warning(self) -> bool:
        """Whether the reward has fallen, or the deciding signal foretells it."""
        return self.alarm is not None or not math.isnan(self.fallen_since)

    @property
    def words(self) -> str:
        """The verdict in one line."""
        if not math.isnan(self.fallen_since):
            since = f"since step {self.fallen_since:g}"
            return f"WARNING: the reward is below half of its peak {since}"
        if self.alarm:
            return warning_words(self.alarm)
        if not any(reading.rule.warns for reading in self.readings):
            return "no verdict: nothing here predicts a collapse better than chance"
        decides = deciding(self.readings)
        if decides is None:
            return "no verdict: the run logs none of the signals that predict better than chance"
        rule = decides.rule
        return (
            f"calm: {_label(rule)} has not passed its threshold; in the studies it had not before "
            f"{rule.collapses - rule.hits} of {rule.collapses} collapses either"
        )


def read_signals(
    steps: pd.DataFrame, updates: pd.DataFrame, thresholds: Thresholds
) -> list[Reading]:
    """The signals of ONE run, beside their thresholds.

    Steps beyond the horizon do not count: no study has measured what they foretell.

    Args:
        steps: lines of its steps.jsonl, with `step`.
        updates: lines of its updates.jsonl, with `step`.
    """
    signals = signal_table(steps, updates)
    seen = signals[signals.index < thresholds.horizon]
    readings = []
    for rule in thresholds.signals:
        sign = SIGNALS[rule.signal].sign
        worst = float((seen[rule.signal] * sign).max()) * sign
        readings.append(Reading(rule=rule, value=worst))
    return readings


def judge(steps: pd.DataFrame, updates: pd.DataFrame, thresholds: Thresholds) -> Verdict:
    """The verdict on ONE run: its signals, and whether its reward has fallen, at any step.

    The arguments are those of `read_signals`, with `reward` in `steps`.
    """
    return Verdict(
        steps=len(steps),
        horizon=thresholds.horizon,
        readings=read_signals(steps, updates, thresholds),
        fallen_since=outcome(steps["reward"].astype(float), steps["step"]).collapse_step,
    )


def deciding(readings: Sequence[Reading]) -> Reading | None:
    """The reading that decides: of the usable ones that with the best AUC, None without any.

    One alone: each of a dozen signals is wrong in a tenth of the runs that survive, and an alarm of
    any of them in almost half.
    """
    usable = [reading for reading in readings if reading.usable]
    return max(usable, key=lambda reading: reading.rule.auc, default=None)


def alarm(readings: Sequence[Reading]) -> Threshold | None:
    """The deciding signal, where it is beyond its threshold."""
    decides = deciding(readings)
    return decides.rule if decides and decides.passed else None


def warning_words(rule: Threshold) -> str:
    """What an alarm has meant in the studies, in one line."""
    words = (
        f"WARNING: {_label(rule)} has passed its threshold, as in the studies before {rule.hits} "
        f"of {rule.collapses} collapses and in {rule.false_alarms} of {rule.survivors} runs without"
    )
    return words if rule.evidence == "run" else f"{words}; it tells arms apart, not runs of one arm"


def _label(rule: Threshold) -> str:
    return SIGNALS[rule.signal].label


def meaning(rule: Threshold) -> str:
    """What a signal's threshold has meant in settings that it was not chosen on."""
    if not rule.collapses + rule.survivors:
        return "not measured"
    within = "-" if math.isnan(rule.within_arm) else f"{rule.within_arm:.2f}"
    return (
        f"caught {rule.hits}/{rule.collapses}, false {rule.false_alarms}/{rule.survivors}, "
        f"AUC {rule.auc:.2f}, in an arm {within}"
    )


def text(verdict: Verdict) -> str:
    """A table of the signals that the run logs, and the verdict below it."""
    judged = min(verdict.steps, verdict.horizon)
    lines = [
        f"{verdict.steps} steps done; signals are judged on {judged} of the first "
        f"{verdict.horizon}",
        f"{'signal':<26} {'worst':>9} {'threshold':>11}         in settings left out",
    ]
    for reading in verdict.readings:
        rule = reading.rule
        if math.isnan(reading.value):
            continue
        limit = f"{'<' if rule.bad == 'low' else '>'} {rule.threshold:.3g}"
        limit = "-" if math.isnan(rule.threshold) else limit
        mark = "passed" if reading.passed else ""
        label = _label(rule)
        lines.append(f"{label:<26} {reading.value:>9.3g} {limit:>11} {mark:<7} {meaning(rule)}")
    return "\n".join([*lines, verdict.words])
