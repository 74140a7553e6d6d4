"""The tables of a study, each computed from one row of measures a run."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from moe_rl.analysis.data.load import StudyRuns
from moe_rl.analysis.data.measures import summarize
from moe_rl.analysis.data.stats import PairedTest, holm, paired_test
from moe_rl.analysis.verdicts import rules
from moe_rl.analysis.verdicts.claims import claims_table
from moe_rl.analysis.verdicts.verdicts import MIN_SEEDS
from moe_rl.experiments.arms import arm_key, find_arm

PAIRED = [field.name for field in dataclasses.fields(PairedTest)]


def study_tables(study: StudyRuns, measures: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Name and rows of every table: runs, arms, claims, paired, where the study has a mild setting
    cures and, of a plan with tests, planned.

    `measures` is `run_measures(study)`. Of the study itself only its settings and the tests of its
    plan are read.
    """
    tables = {
        "runs": measures,
        "arms": summarize(study, measures),
        "claims": claims_table(study, measures),
        "paired": paired_tests(measures),
    }
    if len(cures := cures_table(measures)):
        tables["cures"] = cures
    return tables | ({"planned": planned_tests(study, measures)} if study.tests else {})


def write_tables(folder: Path, tables: Mapping[str, pd.DataFrame]) -> None:
    """Write each table as FOLDER/NAME.csv."""
    for name, table in tables.items():
        (folder / f"{name}.csv").write_text(as_csv(table), encoding="utf-8")


def as_csv(table: pd.DataFrame) -> str:
    """The text of a table's file: numbers to eight digits."""
    return table.to_csv(index=False, lineterminator="\n", float_format="%.8g")


def paired_tests(measures: pd.DataFrame) -> pd.DataFrame:
    """Final reward of arm b minus arm a on common seeds, for the pairs of interest, one row each.

    Columns setting, a, b, those of `PairedTest`, `p_holm` (corrected over the tests against grpo in
    that setting on equally many seeds, NaN for other pairs) and `reading`. `measures` is
    `run_measures(study)`; incomplete runs do not count.
    """
    rows = []
    for setting, group in measures[measures["complete"]].groupby("setting", sort=False):
        finals = group.pivot_table(index="seed", columns="arm", values="final")
        arms = [find_arm(name) for name in sorted(finals, key=arm_key)]
        pairs = [(a, arm.name) for arm in arms for a in arm.compare_with if a in finals]
        for a, b in pairs:
            both = finals[[a, b]].dropna()
            if len(both):
                test = paired_test(both[a], both[b])
                own = {"setting": setting, "a": a, "b": b} | vars(test)
                rows.append(own | {"reading": _reading(test)})
    columns = ["setting", "a", "b", *PAIRED, "reading"]
    table = pd.DataFrame(rows, columns=columns)
    # An exact test of few seeds cannot have a small p: with arms that a study gives fewer seeds, in
    # order to explore, no arm could pass.
    families = table[table["a"] == "grpo"].groupby(["setting", "n"])["p_value"]
    table.insert(len(columns) - 1, "p_holm", families.transform(holm).reindex(table.index))
    return table


def cures_table(measures: pd.DataFrame) -> pd.DataFrame:
    """Is an arm enough for a disease? One row a (setting, arm) that the mild setting has too.

    Columns setting, arm, mild (the setting compared with); value, low, high and n of the difference
    of the final rewards on common seeds; collapsed (seeds that did, in `setting`); verdict and
    reason of `rules.keeps`, reproduced where the arm is enough.
    """
    done = measures[measures["complete"]]
    rows = []
    for setting, runs in done.groupby("setting", sort=False):
        name = rules.mild_setting(runs)
        mild = done[done["setting"] == name]
        for arm in sorted(set(runs["arm"]) & set(mild["arm"]), key=arm_key):
            finding = rules.keeps(runs, mild, arm)
            collapsed = int(runs.loc[runs["arm"] == arm, "collapsed"].sum())
            own = {"setting": setting, "arm": arm, "mild": name} | vars(finding.interval)
            verdict = {"verdict": finding.verdict, "reason": finding.reason}
            rows.append(own | {"collapsed": collapsed} | verdict)
    return pd.DataFrame(rows)


def planned_tests(study: StudyRuns, measures: pd.DataFrame) -> pd.DataFrame:
    """The tests of the study's plan whose arms share complete seeds, one row each.

    Columns family, outcome, a_setting, a_arm, b_setting, b_arm, those of `PairedTest`, `p_holm`
    (corrected over the tests of a family) and `reading`.
    """
    runs = dict(tuple(measures[measures["complete"]].groupby(["setting", "arm"])))
    rows = []
    for family, a, b, outcome in study.tests:
        if not {tuple(a), tuple(b)} <= runs.keys():
            continue
        first, second = (runs[tuple(place)].set_index("seed")[outcome] for place in (a, b))
        both = pd.concat([first, second], axis=1, keys=["a", "b"]).astype(float).dropna()
        if len(both):
            test = paired_test(both["a"], both["b"])
            own = {"family": family, "outcome": outcome}
            own |= {"a_setting": a[0], "a_arm": a[1], "b_setting": b[0], "b_arm": b[1]}
            rows.append(own | vars(test) | {"reading": _reading(test)})
    places = ["a_setting", "a_arm", "b_setting", "b_arm"]
    columns = ["family", "outcome", *places, *PAIRED, "reading"]
    table = pd.DataFrame(rows, columns=columns)
    corrected = table.groupby("family")["p_value"].transform(holm)
    table.insert(len(columns) - 1, "p_holm", corrected)
    return table


def _reading(test: PairedTest) -> str:
    """In a word, what the interval says of b against a: a null result is a result as well."""
    if test.n < MIN_SEEDS:
        return f"fewer than {MIN_SEEDS} seeds"
    if test.low > 0 or test.high < 0:
        return "above" if test.low > 0 else "below"
    equal = max(-test.low, test.high) < rules.MIN_EFFECT
    return f"equal within {rules.MIN_EFFECT:g}" if equal else "open"
