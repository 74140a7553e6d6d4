"""Analysis room: how much of the variance of the log-ratio the routing change causes.

    log w_t = [log p_new(live) - log p_new(replayed)] + [log p_new(replayed) - log p_old]
            =            routing part                 +          weight part

    Var(log w) = Var(routing part) + Var(weight part) + 2 Cov(routing part, weight part)

over the response tokens of one update. The three shares are the three terms over their sum, so
they add up to 1; a share may leave [0, 1] when the two parts pull against each other (negative
covariance). A run's shares are ratios of sums over its sampled updates, not means of ratios: an
update with hardly any variance must not weigh as much as one with plenty.

Under routing replay the loss sees only the weight part; the routing part is then the gap between
the live policy and the replayed one, which replay hides.
"""

from __future__ import annotations

import pandas as pd

from moe_rl.analysis.data.load import KEYS
from moe_rl.analysis.data.stats import bootstrap_interval
from moe_rl.experiments.arms import arm_key

ROUTING = "ratio/routing_part"
WEIGHT = "ratio/weight_part"
COVARIANCE = "ratio/part_covariance"
PARTS = [ROUTING, WEIGHT, COVARIANCE]


def sampled_updates(updates: pd.DataFrame) -> pd.DataFrame:
    """The rows on which the split was measured, all three numbers finite."""
    if not set(PARTS) <= set(updates.columns):
        return updates.iloc[:0]
    numbers = updates[PARTS].astype(float)
    finite = numbers.notna().all(axis=1) & (numbers.abs() < float("inf")).all(axis=1)
    return updates[finite]


def shares_by_run(updates: pd.DataFrame) -> pd.DataFrame:
    """One row a run: `routing_share`, `weight_share`, `covariance_share`, `log_var`, `updates`.

    `log_var` is the mean of the sum of the three terms over the sampled updates. Runs whose sum
    is not positive (on-policy throughout: every ratio is 1) are left out.
    """
    sampled = sampled_updates(updates)
    shares = ["routing_share", "weight_share", "covariance_share"]
    columns = [*KEYS, *shares, "log_var", "updates"]
    if sampled.empty:
        return pd.DataFrame(columns=columns)
    groups = sampled.groupby(KEYS, sort=False)
    sums, counts = groups[PARTS].sum().astype(float), groups.size()
    total = sums[ROUTING] + sums[WEIGHT] + 2 * sums[COVARIANCE]
    table = pd.DataFrame(
        {
            "routing_share": sums[ROUTING] / total,
            "weight_share": sums[WEIGHT] / total,
            "covariance_share": 2 * sums[COVARIANCE] / total,
            "log_var": total / counts,
            "updates": counts,
        }
    )
    return table[total > 0].reset_index()[columns]


def shares_by_arm(updates: pd.DataFrame) -> pd.DataFrame:
    """IQM over seeds of each share with its bootstrap interval, one row a (setting, arm).

    Columns setting, arm, n, and for each of routing, weight, covariance: `<part>_share`,
    `<part>_low`, `<part>_high`. IQMs of shares need not add up to exactly 1.
    """
    rows = []
    for (setting, arm), group in shares_by_run(updates).groupby(["setting", "arm"], sort=False):
        row: dict[str, object] = {"setting": setting, "arm": arm, "n": len(group)}
        for part in ("routing", "weight", "covariance"):
            interval = bootstrap_interval(group[f"{part}_share"])
            row |= {
                f"{part}_share": interval.value,
                f"{part}_low": interval.low,
                f"{part}_high": interval.high,
            }
        rows.append(row)
    frame = pd.DataFrame(rows)
    if frame.empty:
        return frame
    return frame.sort_values("arm", key=lambda arms: arms.map(arm_key), kind="stable").reset_index(
        drop=True
    )
