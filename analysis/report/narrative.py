"""Sentences of the report that are computed from the data, none fixed in advance."""

import math
from typing import Any

import pandas as pd

from moe_rl.analysis.data.collapse import stability_frontier
from moe_rl.analysis.data.load import StudyRuns
from moe_rl.analysis.plots.frontier import CELL_KEYS
from moe_rl.analysis.plots.style import lead_arms, short_number
from moe_rl.analysis.report.page import NONE, bounds, number
from moe_rl.analysis.verdicts.claims import in_question
from moe_rl.analysis.verdicts.verdicts import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED
from moe_rl.experiments.arms import ARMS, MAIN_ARMS, arm_label

CONTROL_SENTENCES = {
    REPRODUCED: "The dense control ends near its peak in the same setting: the failure belongs to "
    "the MoE.",
    NOT_REPRODUCED: "The dense control is unstable too, so the failure is not the MoE's own.",
}


def headline(setting: str, measures: pd.DataFrame, arms: pd.DataFrame, claims: pd.DataFrame) -> str:
    """One paragraph: what happened in one setting, with numbers, and what it says of the claims.

    `measures`, `arms` and `claims` are the rows of `run_measures`, `summarize` and `claims_table`
    for this setting.
    """
    done = arms[arms["runs"] > 0]
    if done.empty:
        return f"In {setting} no run is complete yet."
    fewest, most = int(done["runs"].min()), int(done["runs"].max())
    seeds = f"{most}" if fewest == most else f"{fewest} to {most}"
    plural = "seed" if most == 1 else "seeds"
    leads = lead_arms(done["arm"].tolist())
    sentences = [f"In {setting} ({seeds} {plural} an arm) {_verdict_sentence(claims)}"]
    sentences += [_arm_sentence(row) for row in done.to_dict("records") if row["arm"] in leads]
    if len(leads) < len(done):
        sentences.append(f"{len(done) - len(leads)} more arms are in the figure and the table.")
    sentences += [_order_sentence(measures), _control_sentence(claims)]
    return " ".join(sentence for sentence in sentences if sentence)


def _arm_sentence(row: dict[str, Any]) -> str:
    interval = bounds(row["final_low"], row["final_high"])
    name = arm_label(row["arm"])
    begin = name[0].upper() + name[1:] if row["arm"] in ARMS else name  # a user's name is as given
    words = f"{begin} ended at {row['final']:.2f}"
    words += f" {interval}" if interval else ""
    if math.isfinite(row["drawdown"]) and row["drawdown"] > 0.05:
        words += f" after a peak of {number(row['peak'])}"
    if row["collapsed"]:
        when = number(row["collapse_step"], 0)
        words += f" and collapsed in {row['collapsed']} of {row['runs']} (median step {when})"
    elif row["unstable"]:
        words += f", unstable in {row['unstable']} of {row['runs']}"
    if row["skipped"]:
        words += f"; {row['skipped']} updates with a NaN or inf gradient were skipped"
    return words + "."


def _order_sentence(measures: pd.DataFrame) -> str:
    """On how many common seeds the remedies ended above plain GRPO."""
    finals = measures[measures["complete"]].pivot_table(index="seed", columns="arm", values="final")
    parts = []
    for arm in MAIN_ARMS[1:]:
        if {"grpo", arm} <= set(finals.columns):
            both = finals[["grpo", arm]].dropna()
            wins = int((both[arm] > both["grpo"]).sum())
            parts.append(f"{arm_label(arm)} in {wins} of {len(both)}")
    return f"On the same seeds above GRPO: {', '.join(parts)}." if parts else ""


def _control_sentence(claims: pd.DataFrame) -> str:
    control = claims[claims["key"] == "dense_is_stable"]
    if control.empty:
        return ""
    row = control.iloc[0]
    reason = str(row["reason"]).split(";")[0]
    unsettled = f"Whether the failure is the MoE's own is open ({reason})."
    return CONTROL_SENTENCES.get(str(row["verdict"]), unsettled)


def _verdict_sentence(claims: pd.DataFrame) -> str:
    """The paper's claims that could be judged by name, those that were reproduced first."""
    asked = claims["source"].str.startswith("GSPO") & (claims["n"] > 0)
    paper = claims[asked & in_question(claims)]
    if paper.empty:
        return "none of the paper's claims can be judged."
    named = {
        verdict: paper.loc[paper["verdict"] == verdict, "claim"].tolist()
        for verdict in (REPRODUCED, NOT_REPRODUCED, INCONCLUSIVE)
    }
    words = f"{len(named[REPRODUCED])} of the paper's {len(paper)} claims that could be judged are "
    words += "reproduced"
    words += f": {'; '.join(named[REPRODUCED])}." if named[REPRODUCED] else "."
    if named[NOT_REPRODUCED]:
        words += f" Not reproduced: {'; '.join(named[NOT_REPRODUCED])}."
    if named[INCONCLUSIVE]:
        words += f" Open: {'; '.join(named[INCONCLUSIVE])}."
    return words


def map_headline(study: StudyRuns, measures: pd.DataFrame) -> str:
    """One paragraph on a map: each arm's stability frontier, by noise and updates per rollout."""
    done = measures[measures["complete"]]
    table = stability_frontier(done)
    if table.empty:
        return "No run of the map is complete yet."
    updates = sorted(done["updates_per_rollout"].unique())
    slashed = " / ".join(f"{m:g}" for m in updates)
    noisy = table["router_noise"].nunique() > 1
    sentences = [
        f"The map has {len(done)} complete runs. Largest stable learning rate at {slashed} updates "
        f"per rollout{'.' if noisy else ':'}"
    ]
    for noise, group in table.groupby("router_noise"):
        parts = [
            f"{arm_label(arm)} {_frontier_rates(group[group['arm'] == arm], updates)}"
            for arm in study.arms
            if (group["arm"] == arm).any()
        ]
        at = f"At router noise {noise:g}: " if noisy else ""
        sentences.append(f"{at}{'; '.join(parts)}.")
    return " ".join(sentences)


def _frontier_rates(own: pd.DataFrame, updates: list[float]) -> str:
    rates = {}
    for row in own.to_dict("records"):
        nowhere = math.isnan(row["frontier"])
        sign = "<" if nowhere else "\u2265" if row["censored"] else ""
        rate = _plain(row["lowest"] if nowhere else row["frontier"])
        rates[row["updates_per_rollout"]] = sign + rate
    return " / ".join(rates.get(m, NONE) for m in updates)


def pooled_fields(runs: pd.DataFrame) -> list[str]:
    """Config fields in which runs of one map cell differ, the seed apart: the cell pools them."""
    labels = {"setting", "seed", "folder", "complete", "steps_done"}
    names = [n for n in runs if n not in labels | set(CELL_KEYS) and not n.startswith("summary_")]
    values = runs[names].astype(str)
    cells = values.groupby([runs[key] for key in CELL_KEYS])
    return [name for name in names if bool((cells[name].nunique() > 1).any())]


def config_line(study: StudyRuns) -> str:
    """The settings that made a figure, in a line; a value that differs between arms is a range."""
    runs = study.runs
    seeds = sorted(int(seed) for seed in runs["seed"].unique())
    parts = [
        _span(runs, "learning_rate", "learning rate {}"),
        _span(runs, "learning_rate_schedule", "{}"),
        _span(runs, "updates_per_rollout", "{} updates a rollout"),
        _span(runs, "router_noise", "router noise {}"),
        _span(runs, "hidden_noise", "noise on hidden states {}"),
        _span(runs, "num_layers", "{} layers"),
        _span(runs, "num_experts", "{} experts"),
        _span(runs, "experts_per_token", "top-{}"),
        f"seeds {', '.join(map(str, seeds))}" if len(seeds) < 9 else f"{len(seeds)} seeds",
    ]
    return f"{' / '.join(study.settings)}: {', '.join(part for part in parts if part)}."


def _span(runs: pd.DataFrame, name: str, form: str) -> str:
    if name not in runs.columns:
        return ""
    per_arm = runs.dropna(subset=[name]).groupby("arm")[name].unique()
    values = sorted(set(runs[name].dropna()))
    if not any(values):  # a knob that none of the runs turned
        return ""
    usual = runs[name].mode().iloc[0]
    odd = {arm: own[0] for arm, own in per_arm.items() if len(own) == 1 and own[0] != usual}
    if len(values) == 1 or (len(odd) == 1 and len(values) == 2):
        other = "".join(f" ({arm_label(str(arm))}: {_plain(v)})" for arm, v in odd.items())
        return form.format(_plain(usual)) + other
    return form.format(f"{_plain(values[0])} to {_plain(values[-1])}")


def _plain(value: Any) -> str:
    """A config value in words."""
    return str(value) if isinstance(value, str | bool) else short_number(float(value))
