"""Every run as one row of numbers, and every arm as one row of statistics.

The links of the causal chain (churn, ratio variance, clipping, gradient norm) are taken over the
steps BEFORE the time of collapse: a collapsed policy repeats itself, and its numbers would describe
the wreck instead of the way there. As they follow the learning rate, which warms up and decays,
arms are compared over the same steps: those before the first collapse among the main arms on the
same seed (`window_end`). Only `churn_early` is of fixed steps, and `replay_coverage` of all.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pandas.core.groupby.generic import SeriesGroupBy

from moe_rl.analysis.data.collapse import Outcome, outcome
from moe_rl.analysis.data.load import CONFIG_COLUMNS, KEYS, StudyRuns
from moe_rl.analysis.data.stats import bootstrap_interval, wilson_interval
from moe_rl.analysis.verdicts.attribution import shares_by_run
from moe_rl.experiments.arms import MAIN_ARMS

EARLY_FRACTION = 5  # the early window is a fifth of the steps

CHAIN = [
    "churn_one", "churn_last", "churn_early", "router_disagreement", "token_disagreement",
    "token_var", "sequence_var", "token_ess", "mean_ratio", "survival_10", "rollout_survival_10",
    "negative_above", "largest_token", "clip_share", "grad_norm", "routing_share",
    "response_length", "replay_coverage",
]  # fmt: skip
# Of all steps, collapsed by then or not.
WHOLE = ["skipped", "pass_at_1", "pass_at_k", "operations"]
_SUMMARY = ["seconds", "seconds_per_step", "instruments_share", "machine"]
OUTCOME = [field.name for field in dataclasses.fields(Outcome)]
COLUMNS = [
    *KEYS, "complete", *CONFIG_COLUMNS, *OUTCOME, *_SUMMARY, "window_end", *CHAIN, *WHOLE
]  # fmt: skip
"""The columns of `run_measures`."""


def run_measures(study: StudyRuns) -> pd.DataFrame:
    """One row a run, complete or not: outcome of the reward and the links of the chain.

    Beside the keys, config columns and the fields of `collapse.Outcome`:

    window_end           step before which the links of the chain are read: the first collapse among
                         GRPO, GRPO + replay and GSPO on the same seed in the same setting, or the
                         run's own if it comes first; NaN: the whole run
    churn_one            mean churn of the rollouts' second update: one optimiser step after the
                         recording policy (GSPO paper, 5.3: "after each gradient update")
    churn_last           mean churn of the rollouts' last update, m - 1 optimiser steps after it
    churn_early          the same over the first fifth of the run's steps, collapsed by then or not
    router_disagreement, token_disagreement     the same at the last update, other countings
    token_var, sequence_var     median over rollouts of the mean over updates of Var(w), Var(s)
    token_ess            mean ESS/N of the token ratios
    mean_ratio           mean w; 1 where the old log-probs are those of the policy that sampled
    survival_10, rollout_survival_10     mean share of tokens with w > 10; the second with the
                         rollout engine's log-probs in the denominator, whatever the loss used
    negative_above       median share of the gradient's mass in the branch that PPO's surrogate
                         leaves unbounded: A < 0 with w above the clip range
    largest_token        median share of the gradient's mass of the largest single token; both
                         over updates that have a gradient
    clip_share           mean share of tokens whose gradient the clip removes
    grad_norm            median norm before clipping
    skipped              updates skipped because their gradient was NaN or inf
    pass_at_1, pass_at_k the last held-out ones
    operations           floating-point operations of the run
    replay_coverage      mean share of response (token, layer) pairs that were really replayed; NaN
                         without replay
    routing_share        share of Var(log w) due to routing, see attribution.py
    response_length      mean tokens of a response
    seconds, seconds_per_step, instruments_share     of summary.json
    machine              processor, vector instructions and torch, of summary.json
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
                "machine": machine(run),
            }
        )
    measures = pd.DataFrame(rows)
    measures["window_end"] = _window_end(measures)
    return measures.join(_links(study, measures), on=KEYS)[COLUMNS]


def machine(run: Mapping[str, Any]) -> str:
    """Processor, its vector instructions in use, and torch, as a row of `runs` recorded them."""
    names = ("processor", "cpu_capability", "torch")
    found = (run.get(f"summary_{name}") for name in names)
    return ", ".join(value for value in found if isinstance(value, str))


def before_collapse(
    frame: pd.DataFrame, measures: pd.DataFrame, end: str = "window_end"
) -> pd.DataFrame:
    """The rows of `steps` or `updates` before `end` of their run: `window_end` for all arms over
    the same steps, `collapse_step` for each run as long as it lasts.
    """
    return frame[~(frame["step"].to_numpy(float) >= _of_run(frame, measures, end))]


def _window_end(measures: pd.DataFrame) -> NDArray[np.float64]:
    seeds = ["setting", "seed"]
    main = measures[measures["arm"].isin(MAIN_ARMS) & measures["complete"].astype(bool)]
    first = main.groupby(seeds)["collapse_step"].min()
    of_seed = first.reindex(pd.MultiIndex.from_frame(measures[seeds])).to_numpy(float)
    return np.fmin(measures["collapse_step"].to_numpy(float), of_seed)


def _of_run(frame: pd.DataFrame, measures: pd.DataFrame, name: str) -> NDArray[np.float64]:
    """A number of every row's own run."""
    runs = pd.MultiIndex.from_frame(frame[KEYS])
    return measures.set_index(KEYS)[name].reindex(runs).to_numpy(float)


def _links(study: StudyRuns, measures: pd.DataFrame) -> pd.DataFrame:
    """The links of the chain and `WHOLE`, one row a run; NaN where a run did not record one."""
    updates = study.updates
    before = before_collapse(updates, measures)
    # The same steps of every run: windows that end at a collapse cannot be compared.
    first = np.maximum(1, _of_run(updates, measures, "steps") // EARLY_FRACTION)
    early = updates[updates["step"].to_numpy(float) < first]
    runs = pd.MultiIndex.from_frame(updates[KEYS]).unique()
    moved = with_gradient(before) if "branch/largest_token" in before else before
    table = pd.DataFrame(index=runs, columns=[*CHAIN, *WHOLE], dtype=float)
    at_last = last_updates(before)
    for name, frame, column, statistic in (
        ("churn_one", before[before["update"] == 1], "routing/churn", "mean"),
        ("churn_last", at_last, "routing/churn", "mean"),
        ("churn_early", last_updates(early), "routing/churn", "mean"),
        ("router_disagreement", at_last, "routing/router_disagreement", "mean"),
        ("token_disagreement", at_last, "routing/token_disagreement", "mean"),
        ("token_ess", before, "ratio/token_ess", "mean"),
        ("mean_ratio", before, "ratio/mean", "mean"),
        ("survival_10", before, "ratio/survival_10", "mean"),
        ("rollout_survival_10", before, "rollout_ratio/survival_10", "mean"),
        ("negative_above", moved, "branch/negative_above", "median"),
        ("largest_token", moved, "branch/largest_token", "median"),
        ("clip_share", before, "clip_ratio/region", "mean"),
        ("grad_norm", before, "grad_norm", "median"),
        ("skipped", updates, "skipped", "sum"),
        ("pass_at_1", study.steps, "pass_at_1", "last"),
        ("pass_at_k", study.steps, "pass_at_k", "last"),
        ("operations", study.steps, "operations", "sum"),
        ("replay_coverage", updates, "replay/coverage", "mean"),
        ("response_length", before_collapse(study.steps, measures), "response_length", "mean"),
    ):
        if column in frame:
            table[name] = _grouped(frame, column, KEYS).agg(statistic)
    for kind in ("token", "sequence"):
        if f"ratio/{kind}_var" in before:
            per_step = _grouped(before, f"ratio/{kind}_var", [*KEYS, "step"]).mean()
            table[f"{kind}_var"] = per_step.groupby(level=KEYS).median()
    table["routing_share"] = shares_by_run(before).set_index(KEYS)["routing_share"]
    return table


def with_gradient(updates: pd.DataFrame) -> pd.DataFrame:
    """The updates that have a gradient; all shares of one without, as of equal rewards, are 0."""
    return updates[updates["branch/largest_token"] > 0]


def last_updates(updates: pd.DataFrame) -> pd.DataFrame:
    """The rows of every rollout's last update, where the policy is furthest from the old one.

    Of a step that was interrupted there is none.
    """
    return updates[updates["update"] == updates.groupby(KEYS)["update"].transform("max")]


def _grouped(frame: pd.DataFrame, column: str, keys: list[str]) -> "SeriesGroupBy[Any, Any]":
    return pd.to_numeric(frame[column], errors="coerce").groupby([frame[key] for key in keys])


def summarize(study: StudyRuns, measures: pd.DataFrame | None = None) -> pd.DataFrame:
    """The table of arms: one row a (setting, arm), statistics over its COMPLETE runs.

    `measures` is `run_measures(study)` where the caller has it already.

    final, final_low, final_high    interquartile mean of the final reward, 95% bootstrap interval
    peak, drawdown, deepest_fall    medians over seeds
    collapsed, runs                 k of n; `collapsed_low`, `collapsed_high` the Wilson interval
    collapse_step                   median time of collapse of the runs that collapsed
    unstable                        runs whose drawdown exceeds 20%
    skipped                         updates skipped because their gradient was NaN or inf
    pass_at_1, pass_at_k            medians over seeds of the last held-out ones; NaN without any
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

    def medians(*names: str) -> dict[str, float]:
        return {name: float(done[name].astype(float).median()) for name in names}

    return {
        "runs": len(done),
        "incomplete": int((~group["complete"]).sum()),
        "final": final.value,
        "final_low": final.low,
        "final_high": final.high,
        **medians("peak", "drawdown", "deepest_fall"),
        "collapsed": k,
        "collapsed_low": collapsed.low,
        "collapsed_high": collapsed.high,
        **medians("collapse_step"),
        "unstable": int(done["unstable"].sum()),
        "skipped": int(done["skipped"].fillna(0).sum()),
        **medians("pass_at_1", "pass_at_k", *CHAIN),
        **{
            name: float(done[name].astype(float).mean())
            for name in ("instruments_share", "seconds_per_step", "seconds")
        },
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
