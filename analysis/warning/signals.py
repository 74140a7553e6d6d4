"""The signals: what anybody can read from the log of a run before its reward falls.

A signal is one number a rollout step, a pure function of the lines that the run has logged. Where
a step has several updates it is their mean: the first of them is on-policy and says little, the
last alone is noisy. A column that a log lacks makes the signal absent, which is no error.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

Reader = Callable[[pd.DataFrame, pd.DataFrame], pd.Series]
"""The lines of steps.jsonl and of updates.jsonl in; a value a step out, indexed by step."""

SLOPE_STEPS = 4  # rewards behind a slope: a trend of fewer is the noise of the prompts
FEWEST_BEFORE = 3  # values that a mean and a deviation are taken of
SMALLEST = 1e-12  # a variance of 0 (every ratio exactly 1) has no logarithm


@dataclass(frozen=True, kw_only=True)
class Signal:
    """A quantity, and which of its ends is bad."""

    name: str
    bad: Literal["high", "low"] = "high"
    read: Reader
    label: str
    """As figures and tables print it."""

    @property
    def sign(self) -> int:
        """A signal times its sign is worse the larger it is."""
        return 1 if self.bad == "high" else -1


def _numbers(frame: pd.DataFrame, column: str) -> pd.Series:
    """A column as floats, by step; empty where it was not logged."""
    if column not in frame:
        return pd.Series(dtype=float)
    values = pd.to_numeric(frame[column], errors="coerce").astype(float)
    return values.set_axis(frame["step"].to_numpy())


def of_updates(column: str) -> Reader:
    """Mean of a column over the updates of each step."""
    return lambda steps, updates: _numbers(updates, column).groupby(level=0).mean()


def of_steps(column: str) -> Reader:
    """A column of the step's own line."""
    return lambda steps, updates: _numbers(steps, column)


def _lost_sample_size(steps: pd.DataFrame, updates: pd.DataFrame) -> pd.Series:
    return 1 - of_updates("ratio/token_ess")(steps, updates)


def _log_variance(steps: pd.DataFrame, updates: pd.DataFrame) -> pd.Series:
    return np.log10(of_updates("ratio/token_var")(steps, updates).clip(lower=SMALLEST))


def _gradient_jump(steps: pd.DataFrame, updates: pd.DataFrame) -> pd.Series:
    """(value - mean) / standard deviation, both of the steps before."""
    norm = of_updates("grad_norm")(steps, updates)
    before = norm.expanding(FEWEST_BEFORE)
    return (norm - before.mean().shift(1)) / before.std().shift(1)


def _reward_slope(steps: pd.DataFrame, updates: pd.DataFrame) -> pd.Series:
    """Slope of the least-squares line through the last `SLOPE_STEPS` rewards, reward a step."""
    reward = of_steps("reward")(steps, updates)

    def slope(values: np.ndarray) -> float:
        return float(np.polyfit(np.arange(len(values)), values, 1)[0])

    return reward.rolling(SLOPE_STEPS, min_periods=FEWEST_BEFORE).apply(slope, raw=True)


def _of_update(name: str, column: str, label: str) -> Signal:
    return Signal(name=name, read=of_updates(column), label=label)


_TABLE = (
    _of_update("negative_above", "branch/negative_above", "unbounded branch's share"),
    _of_update("largest_token", "branch/largest_token", "largest token's share"),
    _of_update("ratio_mean", "ratio/mean", "mean ratio"),
    _of_update("survival_10", "ratio/survival_10", "P(ratio > 10)"),
    Signal(name="ratio_log_var", read=_log_variance, label="log10 Var(ratio)"),
    Signal(name="lost_sample_size", read=_lost_sample_size, label="1 - ESS of the ratio"),
    _of_update("extreme_2", "ratio/extreme_2", "F(2) of the ratio"),
    _of_update("kl_k3", "kl_k3", "KL (k3), old to new"),
    _of_update("churn", "routing/churn", "routing churn"),
    _of_update("router_disagreement", "routing/router_disagreement", "router disagreement"),
    Signal(name="router_shift", bad="low", read=of_updates("routing/shift"), label="router shift"),
    _of_update("clip_share", "clip_ratio/region", "clipped share"),
    _of_update("grad_norm", "grad_norm", "gradient norm"),
    Signal(name="grad_norm_jump", read=_gradient_jump, label="gradient norm, deviations"),
    Signal(name="entropy_low", bad="low", read=of_steps("entropy"), label="entropy, low"),
    Signal(name="entropy_high", read=of_steps("entropy"), label="entropy, high"),
    Signal(name="mismatch_kl_k3", read=of_steps("mismatch/kl_k3"), label="KL (k3) to the engine"),
    Signal(
        name="mismatch_extreme_2", read=of_steps("mismatch/extreme_2"), label="F(2) to the engine"
    ),
    # What anybody has without an instrument; a signal worth its cost does better.
    Signal(name="reward_slope", bad="low", read=_reward_slope, label="reward's own slope"),
)
SIGNALS = {signal.name: signal for signal in _TABLE}


def signal_table(steps: pd.DataFrame, updates: pd.DataFrame) -> pd.DataFrame:
    """Every signal of ONE run: a row a step that has ended, a column a signal.

    Args:
        steps: lines of its steps.jsonl with `step` and what was logged, in order.
        updates: lines of its updates.jsonl, likewise.

    Returns:
        Floats in the units of docs/metrics.md, NaN where a signal is absent or has no value yet.
    """
    index = pd.Index(steps["step"].to_numpy(), name="step")
    columns = {name: s.read(steps, updates).reindex(index) for name, s in SIGNALS.items()}
    return pd.DataFrame(columns, index=index)


@dataclass(frozen=True, kw_only=True)
class StatedThreshold:
    """A threshold that somebody has published for a quantity of ours."""

    signal: str
    threshold: float
    source: str


STATED = (
    StatedThreshold(
        signal="mismatch_extreme_2", threshold=0.1, source="R3 (arXiv 2510.11370): at the collapse"
    ),
    StatedThreshold(signal="mismatch_kl_k3", threshold=0.01, source="tinker: healthy below"),
    StatedThreshold(signal="mismatch_kl_k3", threshold=0.015, source="prime-rl: gate"),
    StatedThreshold(signal="mismatch_kl_k3", threshold=0.1, source="verl: abnormal above"),
    StatedThreshold(
        signal="lost_sample_size",
        threshold=0.7,
        source="verl: ESS below 0.3, stated for the rollout correction",
    ),
    StatedThreshold(
        signal="ratio_mean",
        threshold=2.0,
        source="verl: mean above 2, stated for the rollout correction",
    ),
    StatedThreshold(
        signal="router_shift",
        threshold=0.7,
        source="RSPO (arXiv 2510.23027): floor of a token, here of the mean",
    ),
    StatedThreshold(signal="grad_norm_jump", threshold=3.0, source="RLWatch: 3 deviations"),
)
