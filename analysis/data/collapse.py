"""When a training run has collapsed, and how far a setting can be pushed.

Definitions, all on the reward of one run, one value a rollout step (t = 0..n-1):

    smoothed    s_t = mean of the last w rewards up to t (trailing, so that no step sees its
                future), w = max(1, n // 12)
    peak        max_t s_t;   running peak  p_t = max_{u <= t} s_u
    collapse    there is a t with s_u < p_u / 2 for every u >= t; the first such t is the time
    final       mean reward of the last eighth of the steps (at least one)
    drawdown    (peak - final) / peak, cut below at 0; 0 where the peak is 0
    deepest fall    max_t (p_t - s_t) / p_t, from which the run may have come back;
                0 where the peak is 0
    unstable    drawdown > 0.2

A non-finite reward counts as 0: a policy whose reward cannot be computed earns none. Rewards are
taken as non-negative (exact match): half of a negative peak has no meaning.
"""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

COLLAPSE_FRACTION = 0.5  # of the running peak
STABLE_DRAWDOWN = 0.2  # "within 20% of its peak"
WINDOWS_PER_RUN = 12  # a smoothing window is a twelfth of the run: 5 steps of 60
FINAL_FRACTION = 8  # the final reward is the mean over the last eighth


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one run; `collapse_step` is NaN where it did not collapse."""

    steps: int = 0
    peak: float = math.nan
    peak_step: float = math.nan
    final: float = math.nan
    drawdown: float = math.nan
    deepest_fall: float = math.nan
    collapsed: bool = False
    collapse_step: float = math.nan
    unstable: bool = False
    nonfinite_rewards: int = 0


def smoothing_window(steps: int) -> int:
    """Width w of the trailing mean for a run of `steps` rollout steps."""
    return max(1, steps // WINDOWS_PER_RUN)


def smooth(reward: ArrayLike) -> NDArray[np.float64]:
    """Trailing mean over the smoothing window; the first steps average what there is."""
    values = np.asarray(reward, dtype=np.float64).ravel()
    values = np.where(np.isfinite(values), values, 0.0)
    width = smoothing_window(len(values))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    smoothed: NDArray[np.float64] = (sums[ends] - sums[starts]) / (ends - starts)
    return smoothed


def outcome(reward: ArrayLike, steps: ArrayLike | None = None) -> Outcome:
    """Apply the definitions at the head of this file to one run.

    reward: [n], steps: [n] step numbers for the times (default 0..n-1). An empty run has NaN
    rewards and has not collapsed.
    """
    values = np.asarray(reward, dtype=np.float64).ravel()
    times = np.arange(len(values)) if steps is None else np.asarray(steps).ravel()
    if len(values) == 0:
        return Outcome()
    bad = int(np.sum(~np.isfinite(values)))
    values = np.where(np.isfinite(values), values, 0.0)
    smoothed = smooth(values)
    running_peak = np.maximum.accumulate(smoothed)
    below = (running_peak > 0) & (smoothed < COLLAPSE_FRACTION * running_peak)
    # A first value is its own peak, so below[0] is False and there is always a last one above.
    last_above = np.flatnonzero(~below)
    start = int(last_above[-1]) + 1
    collapsed = start < len(values)
    peak = float(smoothed.max())
    final = float(values[-max(1, len(values) // FINAL_FRACTION) :].mean())
    drawdown = max(0.0, (peak - final) / peak) if peak > 0 else 0.0
    falls = np.divide(
        running_peak - smoothed, running_peak, out=np.zeros(len(values)), where=running_peak > 0
    )
    return Outcome(
        steps=len(values),
        peak=peak,
        peak_step=float(times[int(smoothed.argmax())]),
        final=final,
        drawdown=drawdown,
        deepest_fall=float(falls.max()),
        collapsed=collapsed,
        collapse_step=float(times[start]) if collapsed else math.nan,
        unstable=drawdown > STABLE_DRAWDOWN,
        nonfinite_rewards=bad,
    )


def stability_frontier(runs: pd.DataFrame) -> pd.DataFrame:
    """The stability frontier of every (arm, updates_per_rollout, router_noise).

    `runs` needs the columns arm, updates_per_rollout, router_noise, learning_rate, seed, drawdown.
    A learning rate is stable when the MEDIAN of the drawdown over its seeds is at most 0.2; the
    frontier is the largest learning rate that is stable together with every smaller one tried,
    so a lucky cell above an unstable one does not count (`stable_beyond` says there is one).

    Columns: `frontier` (NaN: not even the smallest is stable), `lowest` and `highest` learning
    rate tried, `censored` (stable up to the highest tried: the frontier is a lower bound),
    `seed_low`, `seed_high` (the range of the frontiers of single seeds; a seed that is nowhere
    stable counts as 0), `seeds` (the fewest seeds in a cell).
    """
    keys = ["arm", "updates_per_rollout", "router_noise"]
    rows = []
    for key, group in runs.dropna(subset=["drawdown"]).groupby(keys, sort=True):
        cells = group.groupby("learning_rate")["drawdown"]
        frontier, beyond = _frontier(cells.median())
        by_seed = [
            _frontier(one.groupby("learning_rate")["drawdown"].median())[0]
            for _, one in group.groupby("seed")
        ]
        single = [0.0 if math.isnan(value) else value for value in by_seed]
        tried = group["learning_rate"]
        rows.append(
            dict(zip(keys, key, strict=True))
            | {
                "frontier": frontier,
                "lowest": float(tried.min()),
                "highest": float(tried.max()),
                "censored": frontier == float(tried.max()),
                "stable_beyond": beyond,
                "seed_low": min(single),
                "seed_high": max(single),
                "seeds": int(cells.count().min()),
            }
        )
    columns = [*keys, "frontier", "lowest", "highest", "censored", "stable_beyond"]
    return pd.DataFrame(rows, columns=[*columns, "seed_low", "seed_high", "seeds"])


def _frontier(median_drawdown: pd.Series) -> tuple[float, bool]:
    """Frontier and `stable_beyond` of drawdowns indexed by learning rate."""
    ordered = median_drawdown.sort_index()
    stable = (ordered <= STABLE_DRAWDOWN).to_numpy()
    first_unstable = len(stable) if stable.all() else int(np.argmin(stable))
    frontier = float(ordered.index[first_unstable - 1]) if first_unstable else math.nan
    return frontier, bool(stable[first_unstable:].any())
