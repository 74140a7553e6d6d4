"""Analysis room: every run as one row of numbers, and every arm as one row of statistics.

The links of the causal chain (churn, ratio variance, clipping, gradient norm) are taken over the
steps BEFORE the time of collapse, over the whole run where it does not collapse: a collapsed
policy repeats itself, and its numbers would describe the wreck instead of the way there.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from pandas.core.groupby.generic import SeriesGroupBy

from moe_rl.analysis.data.collapse import outcome
from moe_rl.analysis.data.load import CONFIG_COLUMNS, KEYS, StudyRuns
from moe_rl.analysis.data.stats import bootstrap_interval, wilson_interval
from moe_rl.analysis.verdicts.attribution import shares_by_run

EARLY_FRACTION = 5  # the early window is a fifth of the steps

CHAIN = [
    "churn_one", "churn_last", "churn_early", "router_disagreement", "token_disagreement",
    "token_var", "sequence_var", "token_ess", "clip_share", "grad_norm", "routing_share",
]  # fmt: skip


def run_measures(study: StudyRuns) -> pd.DataFrame:
    """One row a run, complete or not: outcome of the reward and the links of the chain.

    Beside the keys, config columns and the fields of `collapse.Outcome`:

    churn_one            mean churn of the rollouts' second update: one optimiser step after the
                         recording policy (GSPO paper, 5.3: "after each gradient update")
    churn_last           mean churn of the rollouts' last update, m - 1 optimiser steps after it
    churn_early          the same over the first fifth of the run's steps, collapsed by then or not
    router_disagreement, token_disagreement     the same at the last update, other countings
    token_var, sequence_var     median over rollouts of the mean over updates of Var(w), Var(s)
    token_ess            mean ESS/N of the token ratios
    clip_share           mean share of tokens whose gradient the clip removes
    grad_norm            median norm before clipping
    skipped              updates not made, as their gradient was not finite
    routing_share        share of Var(log w) due to routing, see attribution.py
    seconds, seconds_per_step, instruments_share     of summary.json
    """
    steps = dict(tuple(study.steps.groupby(KEYS))) if len(study.steps) else {}
    rows = []
    for run in study.runs.to_dict("records"):
        own = steps.get((run["setting"], run["arm"], run["seed"]))
        reward, times = ([], []) if own is None else (own["reward"].astype(float), own["step"])
        result = outcome(reward, times)
        seconds = run.get("summary_seconds", math.nan)
        rows.append(
            {name: run.get(name) for name in [*KEYS, "complete", *CONFIG_COLUMNS]}
            | vars(result)
            | {
                "seconds": seconds,
                "seconds_per_step": seconds / result.steps if result.steps else math.nan,
                "instruments_share": run.get("summary_instruments_share", math.nan),
            }
        )
    measures = pd.DataFrame(rows)
    links = _chain(before_collapse(study.updates, measures))
    links["churn_early"] = _early_churn(study.updates, measures)
    links["skipped"] = _skipped(study.updates)
    return measures.join(links, on=KEYS)


def _early_churn(updates: pd.DataFrame, measures: pd.DataFrame) -> pd.Series:
    """Churn over the same steps of every run: windows that end at a collapse cannot be compared."""
    if "routing/churn" not in updates:
        return pd.Series(dtype=float)
    steps = measures.set_index(KEYS)["steps"]
    own = steps.reindex(pd.MultiIndex.from_frame(updates[KEYS])).to_numpy(float)
    early = updates[updates["step"].to_numpy(float) < np.maximum(1, own // EARLY_FRACTION)]
    last = early["update"] == early.groupby(KEYS)["update"].transform("max")
    return _grouped(early[last], "routing/churn", KEYS).mean()


def _skipped(updates: pd.DataFrame) -> pd.Series:
    """Updates that were not made because their gradient was not finite."""
    if "skipped" not in updates:
        return pd.Series(dtype=float)
    return _grouped(updates, "skipped", KEYS).sum()


def before_collapse(updates: pd.DataFrame, measures: pd.DataFrame) -> pd.DataFrame:
    """The rows of `updates` before the `collapse_step` of their run; all where that is NaN."""
    collapse = measures.set_index(KEYS)["collapse_step"]
    own = collapse.reindex(pd.MultiIndex.from_frame(updates[KEYS])).to_numpy()
    return updates[~(updates["step"].to_numpy(float) >= own)]


def _chain(updates: pd.DataFrame) -> pd.DataFrame:
    """The links of the chain, one row a run; NaN where a run did not record one."""
    runs = updates[KEYS].drop_duplicates()
    table = pd.DataFrame(index=pd.MultiIndex.from_frame(runs), columns=CHAIN, dtype=float)
    last = updates["update"] == updates.groupby(KEYS)["update"].transform("max")
    at_last, second = updates[last], updates[updates["update"] == 1]
    for name, frame, column in (
        ("churn_one", second, "routing/churn"),
        ("churn_last", at_last, "routing/churn"),
        ("router_disagreement", at_last, "routing/router_disagreement"),
        ("token_disagreement", at_last, "routing/token_disagreement"),
        ("token_ess", updates, "ratio/token_ess"),
        ("clip_share", updates, "clip_ratio/region"),
    ):
        if column in frame:
            table[name] = _grouped(frame, column, KEYS).mean()
    if "grad_norm" in updates:
        table["grad_norm"] = _grouped(updates, "grad_norm", KEYS).median()
    for kind in ("token", "sequence"):
        if f"ratio/{kind}_var" in updates:
            per_step = _grouped(updates, f"ratio/{kind}_var", [*KEYS, "step"]).mean()
            table[f"{kind}_var"] = per_step.groupby(level=KEYS).median()
    table["routing_share"] = shares_by_run(updates).set_index(KEYS)["routing_share"]
    return table


def _grouped(frame: pd.DataFrame, column: str, keys: list[str]) -> SeriesGroupBy[Any, Any]:
    return pd.to_numeric(frame[column], errors="coerce").groupby([frame[key] for key in keys])


def summarize(study: StudyRuns, measures: pd.DataFrame | None = None) -> pd.DataFrame:
    """The table of arms: one row a (setting, arm), statistics over its COMPLETE runs.

    `measures` is `run_measures(study)` where the caller has it already.

    final, final_low, final_high    interquartile mean of the final reward, 95% bootstrap interval
    peak, drawdown, deepest_fall    medians over seeds
    collapsed, runs                 k of n; `collapsed_low`, `collapsed_high` the Wilson interval
    collapse_step                   median time of collapse of the runs that collapsed
    unstable                        runs whose drawdown exceeds 20%
    skipped                         updates not made: their gradient was not finite
    incomplete                      runs that were interrupted: listed, not counted
    the links of the chain          medians over seeds (see `run_measures`)
    instruments_share, seconds_per_step, seconds    means over seeds
    """
    measures = run_measures(study) if measures is None else measures
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
        "deepest_fall": median("deepest_fall"),
        "collapsed": k,
        "collapsed_low": collapsed.low,
        "collapsed_high": collapsed.high,
        "collapse_step": median("collapse_step"),
        "unstable": int(done["unstable"].sum()),
        "skipped": int(done["skipped"].fillna(0).sum()),
        **{name: median(name) for name in CHAIN},
        "instruments_share": float(done["instruments_share"].astype(float).mean()),
        "seconds_per_step": float(done["seconds_per_step"].astype(float).mean()),
        "seconds": float(done["seconds"].astype(float).mean()),
    }


def terminal_table(arms: pd.DataFrame) -> str:
    """The rows of `summarize` as aligned text of at most 100 columns, for a terminal."""
    shown = pd.DataFrame(
        {
            "setting": arms["setting"],
            "arm": arms["arm"],
            "runs": arms["runs"],
            "final": arms["final"].map("{:.2f}".format),
            "95%": [
                f"{low:.2f}-{high:.2f}" if math.isfinite(low) else ""
                for low, high in zip(arms["final_low"], arms["final_high"], strict=True)
            ],
            "peak": arms["peak"].map("{:.2f}".format),
            "collapsed": arms["collapsed"],
            "churn": arms["churn_last"].map("{:.1%}".format),
            "var(w)": arms["token_var"].map("{:.2g}".format),
            "routing": arms["routing_share"].map("{:.0%}".format),
            "clipped": arms["clip_share"].map("{:.2%}".format),
        }
    )
    return shown.replace({"nan": "-", "nan%": "-"}).to_string(index=False)
