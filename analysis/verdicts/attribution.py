"""How much of the variance of the log-ratio the routing change causes.

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

import pandas as pd

from moe_rl.analysis.data.load import KEYS

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
    """One row a run: setting, arm, seed, `routing_share`, `weight_share`, `covariance_share`.

    Runs whose Var(log w) is not positive (on-policy throughout: every ratio is 1) are left out.
    """
    sampled = sampled_updates(updates)
    if sampled.empty:
        return pd.DataFrame(columns=[*KEYS, "routing_share", "weight_share", "covariance_share"])
    sums = sampled.groupby(KEYS, sort=False)[PARTS].sum().astype(float)
    total = sums[ROUTING] + sums[WEIGHT] + 2 * sums[COVARIANCE]
    shares = pd.DataFrame(
        {
            "routing_share": sums[ROUTING] / total,
            "weight_share": sums[WEIGHT] / total,
            "covariance_share": 2 * sums[COVARIANCE] / total,
        }
    )
    return shares[total > 0].reset_index()
