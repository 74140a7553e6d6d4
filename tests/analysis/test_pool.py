"""Pooled parts of a study are the study."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

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


def another_rate(parts: list[Path]) -> None:
    rows = table(parts[0], "runs").assign(learning_rate=0.5)
    rows.to_csv(parts[0] / "runs.csv", index=False)


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


def no_finals(parts: list[Path]) -> None:
    table(parts[0], "runs").drop(columns="final").to_csv(parts[0] / "runs.csv", index=False)


def nothing_complete(parts: list[Path]) -> None:
    del parts[1:]
    table(parts[0], "runs").assign(complete=False).to_csv(parts[0] / "runs.csv", index=False)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (without_runs, "second: found no run folders"),
        (same_seed, "second and .*moved: both have setting 'two', seed 3"),
        (another_rate, "learning_rate is 0.5 in .*tables and .* in .*second"),
        (another_study, "tables: its study.json has name='mine', .*third has 'collapse'"),
        (an_older_plan_last, "tables: its plan has a test that .*third has not, .*gain"),
        (no_plan, "tables/study.json: no such file"),
        (no_table, "tables/runs.csv: no table"),
        (no_finals, "tables/runs.csv: no column 'final'"),
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
