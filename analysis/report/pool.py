"""Seeds of one study that were run apart, on other machines or later, as one study.

A part is a study folder, or a folder with the tables of one: study.json and runs.csv, as
experiments/results/ has them. Pooled are the tables and the figures that need one row a run; time
courses are in the run folders alone.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moe_rl.analysis.data.load import (
    CONFIG_COLUMNS,
    KEYS,
    AnalysisError,
    StudyRuns,
    load_study,
    read_json,
)
from moe_rl.analysis.data.measures import CHAIN, COLUMNS, OUTCOME, run_measures
from moe_rl.analysis.report.figures import FINAL_REWARDS, measure_figures
from moe_rl.analysis.report.svg import save_figure
from moe_rl.analysis.report.tables import as_csv, study_tables, write_tables
from moe_rl.experiments.arms import arm_key
from moe_rl.experiments.study import Comparison
from moe_rl.run_folder.log import write_json

_KINDS = {
    "setting": "string", "arm": "string", "seed": "integer", "complete": "boolean",
    "collapsed": "boolean",
}  # fmt: skip


def pool(folders: Sequence[Path]) -> tuple[StudyRuns, dict[str, Any]]:
    """The complete runs of all parts as one study, and its study.json.

    Of the study only what its tables need is there: `runs` has the columns of `run_measures`, and
    `steps` and `updates` are empty. Its plan is that of the last part, and may have grown.

    Raises:
        AnalysisError: a folder is no part of a study, the parts are of different studies or differ
            in a config column of an arm, or two have one seed of a setting, whose arms are compared
            with each other and must come from one machine.
    """
    plans = _read_plans(folders)
    parts = [_complete_runs(folder).assign(part=str(folder)) for folder in folders]
    parts = [part for part in parts if len(part)]
    if not parts:
        raise AnalysisError(f"{folders[0]}: no run of it is complete; finish the study first")
    runs = pd.concat(parts, ignore_index=True)
    _check_seeds(runs)
    _check_configs(runs)

    planned = [setting for plan in reversed(plans) for setting in plan["settings"]]
    settings = [name for name in dict.fromkeys(planned) if (runs["setting"] == name).any()]
    arms = sorted(set(runs["arm"]), key=arm_key)
    order = {"setting": settings.index, "arm": arms.index, "seed": int}
    runs = runs.drop(columns="part").sort_values(
        KEYS, key=lambda column: column.map(order[column.name]), ignore_index=True
    )
    keys = list(runs[KEYS].itertuples(index=False, name=None))
    plan = plans[-1] | {
        "settings": settings,
        "arms": arms,
        "seeds": sorted(set(runs["seed"].tolist())),
        "runs": keys,
        "command": "; ".join(dict.fromkeys(plan["command"] for plan in plans)),
    }
    study = StudyRuns(
        path=folders[-1],
        name=plan["name"],
        mode=plan["mode"],
        command=plan["command"],
        settings=settings,
        arms=arms,
        runs=runs,
        steps=pd.DataFrame(columns=[*KEYS, "step"]),
        updates=pd.DataFrame(columns=[*KEYS, "step", "update"]),
        planned=keys,
        configs={},
        tests=[Comparison(*test) for test in plan["tests"]],
    )
    return study, plan


def load_measures(folder: Path) -> tuple[StudyRuns, pd.DataFrame]:
    """A study and its `run_measures`, from its run folders, or from its tables as `pool` has them.

    Raises:
        AnalysisError: see `load_study` and `pool`.
    """
    if (folder / "runs.csv").is_file():
        study, _ = pool([folder])
        return study, study.runs
    study = load_study(folder)
    return study, run_measures(study)


def write_pool(study: StudyRuns, plan: dict[str, Any], out: Path) -> dict[str, pd.DataFrame]:
    """Write study.json, every table and the figures of one row a run into `out`; the tables.

    Raises:
        AnalysisError: `out` holds runs, or anything but tables of this study.
    """
    _check_out(out, plan["name"])
    tables = study_tables(study, study.runs)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "study.json", plan)
    write_tables(out, tables)
    for spec in (FINAL_REWARDS, *measure_figures(study.runs)):
        figure = spec.draw(study, study.runs)
        save_figure(out / "figures", f"all-{spec.key}", spec.title, figure)
    return tables


def _check_out(out: Path, name: str) -> None:
    if not out.is_dir() or not any(out.iterdir()):
        return
    if (out / "runs").exists():
        raise AnalysisError(
            f"out={str(out)!r}: holds runs, whose study.json must stay theirs; give another folder"
        )
    if not (out / "study.json").is_file() or read_json(out / "study.json").get("name") != name:
        raise AnalysisError(
            f"out={str(out)!r}: holds no tables of the study {name!r}; give another folder"
        )


def _read_plans(folders: Sequence[Path]) -> list[dict[str, Any]]:
    plans = []
    for folder in folders:
        file = folder / "study.json"
        if not file.is_file():
            raise AnalysisError(
                f"{file}: no such file; give study folders, or folders with study.json and runs.csv"
            )
        plan = {"tests": []} | read_json(file)
        text = [plan.get(key) for key in ("name", "mode", "command")]
        lists = [plan.get(key) for key in ("settings", "tests")]
        if not all(isinstance(value, str) for value in text) or not all(
            isinstance(value, list) for value in lists
        ):
            raise AnalysisError(
                f"{file}: needs the texts name, mode and command and the lists settings and tests, "
                "as `moe-rl` writes them"
            )
        plans.append(plan)
    last = plans[-1]
    for plan, folder in zip(plans, folders, strict=True):
        for key in ("name", "mode"):
            if plan[key] != last[key]:
                raise AnalysisError(
                    f"{folder}: its study.json has {key}={plan[key]!r}, {folders[-1]} has "
                    f"{last[key]!r}; pool the seeds of one study"
                )
        dropped = [test for test in plan["tests"] if test not in last["tests"]]
        if dropped:
            raise AnalysisError(
                f"{folder}: its plan has a test that {folders[-1]} has not, {dropped[0]}; give the "
                "folder with the newest plan last"
            )
    return plans


def _read_rows(folder: Path) -> pd.DataFrame:
    """One row of measures a run, as a table that was written and read again."""
    if (folder / "runs").is_dir():
        return pd.read_csv(io.StringIO(as_csv(run_measures(load_study(folder)))))
    table = folder / "runs.csv"
    if not table.is_file():
        raise AnalysisError(f"{folder}: has neither runs/ nor runs.csv; give a study")
    if not table.read_bytes().endswith(b"\n"):
        raise AnalysisError(f"{table}: ends within a line; copy it once more")
    try:
        return pd.read_csv(table)
    except ValueError as error:
        raise AnalysisError(f"{table}: no table ({error}); `moe-rl report` writes one") from error


def _complete_runs(folder: Path) -> pd.DataFrame:
    """The rows of the complete runs of a part."""
    runs, table = _read_rows(folder), folder / "runs.csv"
    missing = [name for name in (*KEYS, "complete", *OUTCOME) if name not in runs]
    if missing:
        raise AnalysisError(f"{table}: no column {missing[0]!r}; `moe-rl report` writes all")
    for name, kind in _KINDS.items():
        if len(runs) and pd.api.types.infer_dtype(runs[name], skipna=False) != kind:
            raise AnalysisError(f"{table}: {name} must be a {kind} in every row")
    done = runs[runs["complete"].astype(bool)]
    if not np.isfinite(pd.to_numeric(done["final"], errors="coerce")).all():
        raise AnalysisError(f"{table}: final must be a number in every complete run")
    if "window_end" not in runs:  # an earlier version read the links of the chain over other steps
        done = done.drop(columns=[name for name in CHAIN if name in done])
    # Rows of an earlier version may lack a column that came later.
    return done.reindex(columns=list(dict.fromkeys([*COLUMNS, *runs.columns])))


def _check_seeds(runs: pd.DataFrame) -> None:
    for (setting, seed), own in runs.groupby(["setting", "seed"], sort=False)["part"]:
        if own.nunique() > 1:
            raise AnalysisError(
                f"{' and '.join(own.unique())}: both have setting {setting!r}, seed {seed}; arms "
                "are compared seed by seed, so that each seed must be of one part"
            )
    for key, own in runs.groupby(KEYS, sort=False)["part"]:
        if len(own) > 1:
            raise AnalysisError(
                f"{own.iloc[0]}: two runs of {' / '.join(map(str, key))}; give a folder once"
            )


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
