"""Analysis room: the sections of the report, each a function from frames to HTML."""

from __future__ import annotations

import json
import math
from typing import Any

import pandas as pd

from moe_rl.analysis.arms import arm_label
from moe_rl.analysis.data.load import Study, flatten
from moe_rl.analysis.data.stats import paired_test
from moe_rl.analysis.report.page import (
    NONE,
    Column,
    Html,
    arm_name,
    bounds,
    details,
    join,
    number,
    share,
    table,
    tag,
    text,
    verdict_badge,
)
from moe_rl.analysis.verdicts.claims import CLAIMS

PAIRS = [
    ("grpo", "grpo+replay"),
    ("grpo", "gspo"),
    ("grpo+replay", "gspo"),
    ("gspo", "gspo+replay"),
    ("grpo", "dense"),
    ("grpo", "frozen-router"),
]


def arms_section(arms: pd.DataFrame) -> Html:
    """The table of arms of one setting, from `summarize`."""
    columns = [
        Column("arm"),
        Column("final reward", True, "interquartile mean over seeds, 95% bootstrap interval"),
        Column("peak", True, "median over seeds of the largest smoothed reward"),
        Column("drawdown", True, "median over seeds of (peak - final) / peak"),
        Column("deepest fall", True, "median over seeds of the largest fall from a running peak"),
        Column("collapsed", True, "seeds that collapsed, of complete seeds"),
        Column("at step", True, "median time of collapse"),
        Column("churn", True, "at the rollout's last update, median over seeds"),
        Column("Var token ratio", True, "median over rollouts, then over seeds"),
        Column("routing share", True, "of Var(log w), median over seeds"),
        Column("clipped", True, "share of tokens, median over seeds"),
        Column("instruments", True, "share of training time"),
    ]
    rows = [_arm_cells(row) for row in arms.to_dict("records")]
    return table(columns, rows, kind="cards")


def _arm_cells(row: dict[str, Any]) -> list[object]:
    interval = bounds(row["final_low"], row["final_high"])
    final = Html(f"{number(row['final'])} <small>{text(interval)}</small>")
    unfinished = f" <small>({row['incomplete']} incomplete)</small>" if row["incomplete"] else ""
    return [
        arm_name(row["arm"]),
        final,
        number(row["peak"]),
        share(row["drawdown"], 0),
        share(row["deepest_fall"], 0),
        Html(f"{row['collapsed']} of {row['runs']}{unfinished}"),
        number(row["collapse_step"], 0),
        share(row["churn_last"]),
        number(row["token_var"], 3),
        share(row["routing_share"], 0),
        share(row["clip_share"], 2),
        share(row["instruments_share"]),
    ]


def claims_section(claims: pd.DataFrame) -> Html:
    """The claims table of one setting, from `claims_table`."""
    columns = [
        Column("claim"),
        Column("paper says"),
        Column("ours"),
        Column("95% interval", True),
        Column("n", True, "seeds"),
        Column("verdict"),
    ]
    rows = []
    for row in claims.to_dict("records"):
        rule = details("rule", tag("p", row["rule"]))
        claim = Html(f"{text(row['claim'])}<br><small>{text(row['source'])}</small>{rule}")
        interval = bounds(row["low"], row["high"], _digits(row["low"], row["high"])) or NONE
        why = Html(f"{verdict_badge(row['verdict'])}<br><small>{text(row['reason'])}</small>")
        rows.append([claim, row["paper"], row["ours"], interval, row["n"] or NONE, why])
    return table(columns, rows, kind="cards claims")


def _digits(low: float, high: float) -> int:
    """Decimals that show an interval: three where both bounds are below a tenth."""
    return 3 if max(abs(low), abs(high)) < 0.1 else 2


def verdict_matrix(claims: pd.DataFrame, settings: list[str]) -> Html:
    """Settings against claims, one mark a cell; the claims are numbered in a list below."""
    columns = [Column("setting")]
    columns += [Column(f"C{i}", note=claim.text) for i, claim in enumerate(CLAIMS, start=1)]
    marks = claims.set_index(["setting", "key"])["verdict"]
    rows = [
        [s, *(verdict_badge(str(marks[(s, claim.key)]), short=True) for claim in CLAIMS)]
        for s in settings
    ]
    names = "; ".join(f"C{i} {claim.text}" for i, claim in enumerate(CLAIMS, start=1))
    legend = "\u2713 reproduced, \u2717 not reproduced, ? inconclusive. "
    return join([table(columns, rows), tag("p", legend + names + ".", 'class="meta"')])


def paired_tests(measures: pd.DataFrame) -> pd.DataFrame:
    """Final reward of arm b minus arm a on common seeds, for the pairs of interest, one row each.

    Columns setting, a, b, n, difference, low, high, p_value. `measures` is `run_measures(study)`;
    incomplete runs do not count.
    """
    rows = []
    for setting, group in measures[measures["complete"]].groupby("setting", sort=False):
        finals = group.pivot_table(index="seed", columns="arm", values="final")
        for a, b in PAIRS:
            if a not in finals or b not in finals:
                continue
            both = finals[[a, b]].dropna()
            if len(both):
                test = paired_test(both[a], both[b])
                rows.append({"setting": setting, "a": a, "b": b} | vars(test))
    columns = ["setting", "a", "b", "n", "difference", "low", "high", "p_value"]
    return pd.DataFrame(rows, columns=columns)


def paired_section(tests: pd.DataFrame) -> Html:
    """The table of paired tests of one setting."""
    if tests.empty:
        return tag("p", "No two arms share a complete seed, so there is nothing to pair.")
    columns = [
        Column("difference of final reward"),
        Column("mean", True),
        Column("95% interval", True),
        Column("p", True, "two-sided sign-flip permutation test"),
        Column("n", True, "seeds both arms have"),
    ]
    rows = [
        [
            f"{arm_label(row['b'])} \u2212 {arm_label(row['a'])}",
            number(row["difference"]),
            bounds(row["low"], row["high"]) or NONE,
            number(row["p_value"], 3),
            row["n"],
        ]
        for row in tests.to_dict("records")
    ]
    floor = 2.0 ** (1 - int(tests["n"].max()))
    note = (
        f"Same seeds, not corrected for the number of pairs. With {int(tests['n'].max())} seeds an "
        f"exact p value cannot fall below {floor:.3g}."
    )
    return join([table(columns, rows, kind="cards"), tag("p", note, 'class="meta"')])


def runs_section(study: Study) -> Html:
    """Incomplete and absent runs, and what the loader left out, plainly."""
    items: list[object] = []
    for run in study.runs[~study.runs["complete"]].to_dict("records"):
        planned = run.get("steps")
        of = f" of {int(planned)}" if planned is not None and not pd.isna(planned) else ""
        items.append(
            f"Incomplete: {run['setting']} / {run['arm']} / seed {run['seed']}, "
            f"{run['steps_done']}{of} steps. Drawn, but in no statistic."
        )
    items += [f"Not started: {' / '.join(map(str, key))}." for key in absent_runs(study)]
    items += [note.replace(f"{study.path}/", "") + "." for note in study.notes]
    if not items:
        return tag("p", "Every run is complete and every line of every file was read.")
    return tag("ul", join([tag("li", item) for item in items]), 'class="notes"')


def absent_runs(study: Study) -> list[tuple[str, str, int]]:
    """Runs that study.json plans and that have no folder."""
    return [key for key in study.planned if key not in study.configs]


def config_section(study: Study, chapters: list[str]) -> Html:
    """What differs between the arms of each chapter's setting, and one whole config to open.

    A map without chapters gets the fields that vary over the whole study instead.
    """
    if not chapters:
        return join([_varying(study), _whole(study)])
    parts = []
    for setting in chapters:
        one = study.setting(setting)
        arms = [arm for arm in study.arms if (one.runs["arm"] == arm).any()]
        firsts = {arm: next(c for k, c in one.configs.items() if k[1] == arm) for arm in arms}
        rows = _differences({arm: flatten(config) for arm, config in firsts.items()})
        columns = [Column("field"), *(Column(arm_label(arm)) for arm in arms)]
        same = tag("p", "The arms have the same configuration.")
        content = join([table(columns, rows) if rows else same, _whole(one)])
        parts.append(details(f"{setting}: what differs between arms", content))
    return join(parts)


def _whole(study: Study) -> Html:
    (setting, arm, seed), config = next(iter(study.configs.items()))
    words = f"whole configuration of {setting}, {arm_label(arm)}, seed {seed}"
    return details(words, tag("pre", json.dumps(config, indent=2, sort_keys=True)))


def _varying(study: Study) -> Html:
    """Config fields with more than one value over the study, and those values."""
    configs = [flatten(config) for config in study.configs.values()]
    rows: list[list[object]] = []
    for name in sorted({name for config in configs for name in config} - {"setting"}):
        values = sorted({str(config.get(name, NONE)) for config in configs})
        if len(values) > 1:
            rows.append([tag("code", name), ", ".join(values)])
    return table([Column("field that varies"), Column("values")], rows)


def _differences(configs: dict[str, dict[str, Any]]) -> list[list[object]]:
    names = sorted({name for config in configs.values() for name in config})
    rows: list[list[object]] = []
    for name in names:
        values = [config.get(name, NONE) for config in configs.values()]
        if name not in ("arm", "seed", "setting") and any(v != values[0] for v in values):
            rows.append([tag("code", name), *(str(value) for value in values)])
    return rows


PHASES = ["rollout", "old_logprobs", "updates", "instruments"]


def environment_section(study: Study) -> Html:
    """Versions, model sizes and where the time went, from the summaries."""
    done = study.runs[study.runs["complete"]]
    if done.empty:
        return tag("p", "No run is complete, and the environment is written with the summary.")
    facts = [
        f"{name} {', '.join(sorted(str(v) for v in done[f'summary_{name}'].dropna().unique()))}"
        for name in ("torch", "transformers", "threads")
        if f"summary_{name}" in done
    ]
    total = pd.to_numeric(done.get("summary_seconds", pd.Series(dtype=float))).sum()
    facts.append(f"{len(done)} complete runs, {number(total / 60, 1)} minutes of training in all")
    columns = [Column("arm"), Column("parameters", True), Column("active", True)]
    columns += [Column("s a step", True)]
    columns += [Column(f"{phase.replace('_', ' ')}", True, "share of the time") for phase in PHASES]
    rows = [
        _cost_cells(arm, done[done["arm"] == arm])
        for arm in study.arms
        if (done["arm"] == arm).any()
    ]
    return join([tag("p", "; ".join(facts) + "."), table(columns, rows, kind="cards")])


def _cost_cells(arm: str, runs: pd.DataFrame) -> list[object]:
    def total(name: str) -> float:
        column = f"summary_{name}"
        return float(pd.to_numeric(runs[column]).sum()) if column in runs else math.nan

    def count(name: str) -> str:
        column = f"summary_{name}"
        values = pd.to_numeric(runs[column]).dropna() if column in runs else pd.Series(dtype=float)
        return f"{values.iloc[0]:,.0f}" if len(values) else NONE

    seconds, steps = total("seconds"), total("steps")
    phases = [total(f"seconds_{phase}") / seconds if seconds else math.nan for phase in PHASES]
    return [
        arm_name(arm),
        count("parameters"),
        count("active_parameters"),
        number(seconds / steps if steps else math.nan),
        *(share(phase, 0) for phase in phases),
    ]
