"""Seeds of one study that were run apart, on other machines or later, as one study.

A part is a study folder, or a folder with the tables of one: study.json and runs.csv, as
experiments/results/ has them. Pooled are the tables and the figure of final rewards, which need one
row a run; time courses are in the run folders alone.
"""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from moe_rl.analysis.data.load import (
    CONFIG_COLUMNS,
    KEYS,
    AnalysisError,
    StudyRuns,
    load_study,
    read_json,
)
from moe_rl.analysis.data.measures import run_measures
from moe_rl.analysis.plots.remedies import final_rewards
from moe_rl.analysis.report.figures import FINAL_REWARDS
from moe_rl.analysis.report.svg import save_figure
from moe_rl.analysis.report.tables import as_csv, study_tables, write_tables
from moe_rl.experiments.arms import arm_key
from moe_rl.experiments.study import Comparison


def pool(folders: Sequence[Path]) -> tuple[StudyRuns, dict[str, Any]]:
    """The complete runs of all parts as one study, and its study.json.

    Of the study only what its tables need is there: `runs` has the columns of `run_measures`, and
    `steps` and `updates` are empty. Its plan is that of the last part, and may have grown.

    Raises:
        AnalysisError: a folder is no part of a study, the parts are of different studies or differ
            in an arm's config, or two have one seed of a setting, whose arms are compared with each
            other and must come from one machine.
    """
    plans = [read_json(_file(folder, "study.json")) for folder in folders]
    for plan, folder in zip(plans, folders, strict=True):
        for key in ("name", "mode"):
            if plan.get(key) != plans[-1].get(key):
                raise AnalysisError(
                    f"{folder}: its study.json has {key}={plan.get(key)!r}, {folders[-1]} has "
                    f"{plans[-1].get(key)!r}; pool the seeds of one study"
                )
        lost = [test for test in plan.get("tests", []) if test not in plans[-1].get("tests", [])]
        if lost:
            raise AnalysisError(
                f"{folder}: its plan has a test that {folders[-1]} has not, {lost[0]}; give the "
                "folder with the newest plan last"
            )
    parts = [_complete_runs(folder).assign(part=str(folder)) for folder in folders]
    runs = pd.concat(parts, ignore_index=True)
    if runs.empty:
        raise AnalysisError(f"{folders[0]}: no run of it is complete; finish the study first")
    _check_seeds(runs)
    _check_configs(runs)

    settings = list(dict.fromkeys(runs["setting"]))
    order = {
        "setting": settings.index,
        "arm": sorted(set(runs["arm"]), key=arm_key).index,
        "seed": int,
    }
    runs = runs.drop(columns="part").sort_values(
        KEYS, key=lambda column: column.map(order[column.name]), ignore_index=True
    )
    keys = list(runs[KEYS].itertuples(index=False, name=None))
    study = StudyRuns(
        path=folders[0],
        name=plans[-1]["name"],
        mode=plans[-1]["mode"],
        command="; ".join(dict.fromkeys(plan["command"] for plan in plans)),
        settings=settings,
        arms=sorted(set(runs["arm"]), key=arm_key),
        runs=runs,
        steps=pd.DataFrame(columns=[*KEYS, "step"]),
        updates=pd.DataFrame(columns=[*KEYS, "step", "update"]),
        planned=keys,
        configs={},
        tests=[Comparison(*test) for test in plans[-1].get("tests", [])],
    )
    held = {"settings": settings, "arms": study.arms, "seeds": sorted(set(runs["seed"].tolist()))}
    return study, plans[-1] | held | {"runs": keys, "command": study.command}


def write_pool(study: StudyRuns, plan: dict[str, Any], out: Path) -> dict[str, pd.DataFrame]:
    """Write study.json, every table and the figure of final rewards into `out`; the tables."""
    tables = study_tables(study, study.runs)
    out.mkdir(parents=True, exist_ok=True)
    (out / "study.json").write_text(json.dumps(plan, indent=2) + "\n", encoding="utf-8")
    write_tables(out, tables)
    figure = final_rewards(study.runs, study.settings)
    save_figure(out / "figures", f"all-{FINAL_REWARDS.key}", FINAL_REWARDS.title, figure)
    return tables


def _file(folder: Path, name: str) -> Path:
    file = folder / name
    if not file.is_file():
        raise AnalysisError(
            f"{file}: no such file; give study folders, or folders with study.json and runs.csv"
        )
    return file


def _complete_runs(folder: Path) -> pd.DataFrame:
    """One row of measures a complete run, as a table that was written and read again."""
    table = folder / "runs.csv"
    text = table.read_text() if table.is_file() else as_csv(run_measures(load_study(folder)))
    try:
        runs = pd.read_csv(io.StringIO(text))
        missing = [name for name in [*KEYS, "complete", "final"] if name not in runs]
    except ValueError as error:
        raise AnalysisError(f"{table}: no table ({error}); `moe-rl report` writes one") from error
    if missing:
        raise AnalysisError(f"{table}: no column {missing[0]!r}; `moe-rl report` writes one")
    # Rows of an earlier version may lack a config column that came later.
    columns = list(dict.fromkeys([*KEYS, "complete", *CONFIG_COLUMNS, *runs.columns]))
    return runs[runs["complete"].astype(bool)].reindex(columns=columns)


def _check_seeds(runs: pd.DataFrame) -> None:
    for (setting, seed), own in runs.groupby(["setting", "seed"], sort=False)["part"]:
        if own.nunique() > 1:
            raise AnalysisError(
                f"{' and '.join(own.unique())}: both have setting {setting!r}, seed {seed}; arms "
                "are compared seed by seed, so that each seed must be of one part"
            )
    for key, own in runs.groupby(KEYS, sort=False)["part"]:
        if len(own) > 1:
            raise AnalysisError(f"{own.iloc[0]}: two runs of {' / '.join(map(str, key))}")


def _check_configs(runs: pd.DataFrame) -> None:
    columns = [name for name in [*CONFIG_COLUMNS, "steps"] if name in runs]
    for (setting, arm), own in runs.groupby(["setting", "arm"], sort=False):
        for name in columns:
            values = own.dropna(subset=name).drop_duplicates(name)  # NaN: of an earlier version
            if len(values) > 1:
                said = " and ".join(f"{row[name]} in {row['part']}" for _, row in values.iterrows())
                raise AnalysisError(
                    f"setting {setting!r}, arm {arm!r}: {name} is {said}; not one study"
                )
