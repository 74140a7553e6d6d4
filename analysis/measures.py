"""Analysis room: every run as one row of numbers, and every arm as one row of statistics.

The links of the causal chain (churn, ratio variance, clipping, gradient norm) are taken over the
steps BEFORE the time of collapse, over the whole run where it does not collapse: a collapsed
policy repeats itself, and its numbers would describe the wreck instead of the way there.
"""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from moe_rl.analysis.attribution import shares_by_run
from moe_rl.analysis.collapse import outcome
from moe_rl.analysis.load import CONFIG_COLUMNS, KEYS, Study
from moe_rl.analysis.stats import bootstrap_interval, wilson_interval

CHAIN = [
    "churn_one", "churn_last", "router_disagreement", "token_disagreement", "token_var",
    "sequence_var", "token_ess", "clip_share", "grad_norm", "routing_share",
]  # fmt: skip


def run_measures(study: Study) -> pd.DataFrame:
    """One row a run, complete or not: outcome of the reward and the links of the chain.

    Beside the keys, config columns and the fields of `collapse.Outcome`:

    churn_one            mean churn of the rollouts' second update: one optimiser step after the
                         recording policy (GSPO paper, 5.3: "after each gradient update")
    churn_last           mean churn of the rollouts' last update, m - 1 optimiser steps after it
    router_disagreement, token_disagreement     the same at the last update, other countings
    token_var, sequence_var     median over rollouts of the mean over updates of Var(w), Var(s)
    token_ess            mean ESS/N of the token ratios
    clip_share           mean share of tokens whose gradient the clip removes
    grad_norm            median norm before clipping
    routing_share        share of Var(log w) due to routing, see attribution.py
    seconds, seconds_per_step, instruments_share     of summary.json
    """
    rows = []
    steps = dict(tuple(study.steps.groupby(KEYS))) if len(study.steps) else {}
    updates = dict(tuple(study.updates.groupby(KEYS))) if len(study.updates) else {}
    for run in study.runs.to_dict("records"):
        key = (run["setting"], run["arm"], run["seed"])
        own_steps = steps.get(key, pd.DataFrame(columns=["step", "reward"]))
        result = outcome(own_steps["reward"].astype(float), own_steps["step"])
        row = {name: run.get(name) for name in [*KEYS, "complete", *CONFIG_COLUMNS]}
        row |= vars(result)
        row |= _chain(before_collapse(updates.get(key), result.collapse_step))
        seconds = run.get("summary_seconds", math.nan)
        row["seconds"] = seconds
        row["seconds_per_step"] = seconds / result.steps if result.steps else math.nan
        row["instruments_share"] = run.get("summary_instruments_share", math.nan)
        rows.append(row)
    return pd.DataFrame(rows)


def before_collapse(updates: pd.DataFrame | None, collapse_step: float) -> pd.DataFrame | None:
    """The updates of one run before `collapse_step`; all of them where it is NaN."""
    if updates is None or math.isnan(collapse_step):
        return updates
    earlier = updates[updates["step"] < collapse_step]
    return earlier if len(earlier) else updates


def column_or_nan(frame: pd.DataFrame | None, name: str) -> pd.Series:
    """A column as floats; one NaN where the run did not record it."""
    if frame is None or name not in frame.columns:
        return pd.Series([math.nan], dtype=float)
    return pd.to_numeric(frame[name], errors="coerce")


def _chain(updates: pd.DataFrame | None) -> dict[str, float]:
    if updates is None or updates.empty:
        return dict.fromkeys(CHAIN, math.nan)
    last = updates[updates["update"] == updates["update"].max()]
    second = updates[updates["update"] == 1]
    shares = shares_by_run(updates)
    return {
        "churn_one": float(column_or_nan(second, "routing/churn").mean()),
        "churn_last": float(column_or_nan(last, "routing/churn").mean()),
        "router_disagreement": float(column_or_nan(last, "routing/router_disagreement").mean()),
        "token_disagreement": float(column_or_nan(last, "routing/token_disagreement").mean()),
        "token_var": _typical_variance(updates, "ratio/token_var"),
        "sequence_var": _typical_variance(updates, "ratio/sequence_var"),
        "token_ess": float(column_or_nan(updates, "ratio/token_ess").mean()),
        "clip_share": float(column_or_nan(updates, "clip_ratio/region").mean()),
        "grad_norm": float(column_or_nan(updates, "grad_norm").median()),
        "routing_share": float(shares["routing_share"].iloc[0]) if len(shares) else math.nan,
    }


def _typical_variance(updates: pd.DataFrame, name: str) -> float:
    if name not in updates.columns:
        return math.nan
    per_step = pd.to_numeric(updates[name], errors="coerce").groupby(updates["step"]).mean()
    return float(per_step.median())


def summarize(study: Study) -> pd.DataFrame:
    """The table of arms: one row a (setting, arm), statistics over its COMPLETE runs.

    final, final_low, final_high    interquartile mean of the final reward, 95% bootstrap interval
    peak, drawdown                  medians over seeds
    collapsed, runs                 k of n; `collapsed_low`, `collapsed_high` the Wilson interval
    collapse_step                   median time of collapse of the runs that collapsed
    unstable                        runs whose drawdown exceeds 20%
    incomplete                      runs that were interrupted: listed, not counted
    the links of the chain          medians over seeds (see `run_measures`)
    instruments_share, seconds_per_step, seconds    means over seeds
    """
    measures = run_measures(study)
    rows = []
    for (setting, arm), group in measures.groupby(["setting", "arm"], sort=False):
        rows.append({"setting": setting, "arm": arm} | _arm_row(group))
    return pd.DataFrame(rows)


def _arm_row(group: pd.DataFrame) -> dict[str, Any]:
    done = group[group["complete"]]
    final = bootstrap_interval(done["final"])
    k = int(done["collapsed"].sum())
    collapsed = wilson_interval(k, len(done))

    def median(name: str) -> float:
        return float(done[name].astype(float).median())

    return {
        "runs": len(done),
        "incomplete": int((~group["complete"]).sum()),
        "final": final.value,
        "final_low": final.low,
        "final_high": final.high,
        "peak": median("peak"),
        "drawdown": median("drawdown"),
        "collapsed": k,
        "collapsed_low": collapsed.low,
        "collapsed_high": collapsed.high,
        "collapse_step": median("collapse_step"),
        "unstable": int(done["unstable"].sum()),
        **{name: median(name) for name in CHAIN},
        "instruments_share": float(done["instruments_share"].astype(float).mean()),
        "seconds_per_step": float(done["seconds_per_step"].astype(float).mean()),
        "seconds": float(done["seconds"].astype(float).mean()),
    }
