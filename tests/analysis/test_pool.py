"""Pooled parts of a study are the study."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from synthetic import write_study

from moe_rl.analysis import AnalysisError, write_report
from moe_rl.analysis.report.pool import pool, write_pool
from moe_rl.commands.cli import main

TABLES = ("runs", "arms", "claims", "paired", "planned")
TEST = ["gain", ["one", "grpo"], ["two", "gspo"], "final"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_study(
        tmp_path_factory.mktemp("pool") / "whole",
        arms=["grpo", "grpo+replay", "gspo"],
        settings=("two", "one"),
        steps=16,
        updates=2,
    )
    plan = json.loads((root / "study.json").read_text())
    (root / "study.json").write_text(json.dumps(plan | {"tests": [TEST], "analysis": "a plan"}))
    write_report(root)
    return root


@pytest.fixture
def parts(whole: Path, tmp_path: Path) -> list[Path]:
    """Seeds 1 to 2 as committed tables, seed 3 and seeds 4 to 5 as study folders."""
    folders = []
    for name, seeds in (("first", (1, 2)), ("second", (3,)), ("third", (4, 5))):
        folder = tmp_path / name
        shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("report"))
        for run in folder.glob("runs/*/*/seed*"):
            if int(run.name.removeprefix("seed")) not in seeds:
                shutil.rmtree(run)
        folders.append(folder)
    write_pool(*pool(folders[:1]), tmp_path / "tables")
    return [tmp_path / "tables", *folders[1:]]


def table(folder: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(folder / f"{name}.csv")


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_parts_give_the_tables_of_the_whole(
    parts: list[Path], whole: Path, tmp_path: Path, order: tuple[int, ...]
) -> None:
    out = tmp_path / "out"
    assert main(["pool", *(str(parts[index]) for index in order), "--out", str(out)]) == 0
    for name in TABLES:
        expected = table(whole / "report" / "data", name)
        pd.testing.assert_frame_equal(table(out, name), expected, rtol=1e-6, atol=1e-7, obj=name)
    plan, theirs = (json.loads((folder / "study.json").read_text()) for folder in (out, whole))
    assert sorted(plan.pop("runs")) == sorted(theirs.pop("runs"))
    assert plan == theirs
    assert (out / "figures" / "all-final-rewards.png").stat().st_size > 1000


def test_a_pool_can_be_pooled_again_and_into_its_own_folder(parts: list[Path], whole: Path) -> None:
    for part in parts[1:]:
        write_pool(*pool([parts[0], part]), parts[0])
    expected = table(whole / "report" / "data", "runs")
    pd.testing.assert_frame_equal(table(parts[0], "runs"), expected, rtol=1e-6, atol=1e-7)


def test_tables_of_a_version_without_an_option_are_a_part(parts: list[Path]) -> None:
    rows = table(parts[0], "runs").drop(columns="hidden_noise")
    rows.to_csv(parts[0] / "runs.csv", index=False)
    assert len(pool(parts)[0].runs) == 30


def test_of_a_version_that_read_other_steps_only_the_outcome_is_kept(parts: list[Path]) -> None:
    rows = table(parts[0], "runs").drop(columns=["window_end", "machine"])
    rows.to_csv(parts[0] / "runs.csv", index=False)
    pooled = pool(parts)[0].runs
    old = pooled["seed"] < 3
    assert pooled.loc[old, "token_var"].isna().all() and pooled["final"].notna().all()
    assert pooled.loc[~old, "token_var"].notna().all()


def test_interrupted_runs_are_left_out(parts: list[Path]) -> None:
    (parts[1] / "runs" / "one" / "gspo" / "seed3" / "summary.json").unlink()
    study, plan = pool(parts)
    assert ("one", "gspo", 3) not in plan["runs"]
    assert len(study.runs) == len(plan["runs"]) == 29


def without_runs(parts: list[Path]) -> None:
    shutil.rmtree(parts[1] / "runs")


def same_seed(parts: list[Path]) -> None:
    parts.append(parts[1].rename(parts[1].with_name("moved")))
    shutil.copytree(parts[-1], parts[1])


def another_study(parts: list[Path]) -> None:
    plan = json.loads((parts[0] / "study.json").read_text())
    (parts[0] / "study.json").write_text(json.dumps(plan | {"name": "mine"}))


def an_older_plan_last(parts: list[Path]) -> None:
    plan = json.loads((parts[-1] / "study.json").read_text())
    (parts[-1] / "study.json").write_text(json.dumps(plan | {"tests": []}))


def no_plan(parts: list[Path]) -> None:
    (parts[0] / "study.json").unlink()


def no_table(parts: list[Path]) -> None:
    (parts[0] / "runs.csv").write_text("")


def changed(**columns: Any) -> Callable[[list[Path]], None]:
    """A table with other values in some columns; None: without the column."""

    def spoil(parts: list[Path]) -> None:
        rows = table(parts[0], "runs")
        for name, value in columns.items():
            rows = rows.drop(columns=name) if value is None else rows.assign(**{name: value})
        rows.to_csv(parts[0] / "runs.csv", index=False)

    return spoil


def cut_short(parts: list[Path]) -> None:
    file = parts[0] / "runs.csv"
    file.write_text(file.read_text()[:-200])


def latin(parts: list[Path]) -> None:
    (parts[0] / "runs.csv").write_bytes(b"setting,arm\n\xe9,x\n")


def no_command(parts: list[Path]) -> None:
    plan = json.loads((parts[0] / "study.json").read_text())
    del plan["command"]
    (parts[0] / "study.json").write_text(json.dumps(plan))


def nothing_complete(parts: list[Path]) -> None:
    del parts[1:]
    table(parts[0], "runs").assign(complete=False).to_csv(parts[0] / "runs.csv", index=False)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (without_runs, "second: has neither runs/ nor runs.csv"),
        (same_seed, "second and .*moved: both have setting 'two', seed 3"),
        (changed(learning_rate=0.5), "learning_rate is 0.5 in .*tables and .* in .*second"),
        (another_study, "tables: its study.json has name='mine', .*third has 'collapse'"),
        (an_older_plan_last, "tables: its plan has a test that .*third has not, .*gain"),
        (no_plan, "tables/study.json: no such file"),
        (no_table, "tables/runs.csv: ends within a line"),
        (latin, "tables/runs.csv: no table"),
        (cut_short, "tables/runs.csv: ends within a line"),
        (changed(final=None), "tables/runs.csv: no column 'final'"),
        (changed(collapsed=None), "tables/runs.csv: no column 'collapsed'"),
        (changed(final="x"), "tables/runs.csv: final must be a number"),
        (changed(seed=[1, 2, 1, 2.5] * 3), "tables/runs.csv: seed must be a integer"),
        (changed(complete="yes"), "tables/runs.csv: complete must be a boolean"),
        (changed(arm=[None] * 12), "tables/runs.csv: arm must be a string"),
        (no_command, "tables/study.json: needs the texts name, mode and command"),
        (nothing_complete, "tables: no run of it is complete"),
    ],
)
def test_what_is_no_part_is_refused(
    parts: list[Path], spoil: Callable[[list[Path]], None], said: str
) -> None:
    spoil(parts)
    with pytest.raises(AnalysisError, match=said):
        pool(parts)


def test_two_rows_of_one_run_are_refused(parts: list[Path]) -> None:
    rows = table(parts[0], "runs")
    pd.concat([rows, rows[:1]]).to_csv(parts[0] / "runs.csv", index=False)
    with pytest.raises(AnalysisError, match="two runs of two / grpo / 1"):
        pool(parts)


def test_settings_stand_in_the_order_of_the_plan(parts: list[Path]) -> None:
    rows = table(parts[0], "runs")
    rows[rows["setting"] == "one"].to_csv(parts[0] / "runs.csv", index=False)
    assert pool(parts)[0].settings == ["two", "one"]


@pytest.mark.parametrize("name", ["third", "foreign", "other"])
def test_only_tables_of_the_same_study_are_replaced(
    parts: list[Path], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = parts[-1].with_name(name)
    if name == "foreign":
        (out / "mine").mkdir(parents=True)
    if name == "other":
        shutil.copytree(parts[0], out)
        plan = json.loads((out / "study.json").read_text())
        (out / "study.json").write_text(json.dumps(plan | {"name": "mine"}))
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    assert main(["pool", *map(str, parts), "--out", str(out)]) == 2
    assert f"{name}': holds " in capsys.readouterr().err
    assert before == {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}


def test_runs_of_two_machines_are_told(
    parts: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    changed(machine="a laptop")(parts)
    summary = next(parts[1].glob("runs/*/*/*/summary.json"))
    told = json.loads(summary.read_text()) | {"processor": "a server"}
    summary.write_text(json.dumps(told))
    assert main(["pool", *map(str, parts), "--out", str(parts[0])]) == 0
    assert "runs of 3 machines (2.13.0; a laptop; a server, 2.13.0)" in capsys.readouterr().out
