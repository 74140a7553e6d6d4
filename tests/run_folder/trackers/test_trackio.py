"""trackio, for real and local: its database written, and read back by its own reader."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import Killed, killed_after

from moe_rl.config import RunConfig
from moe_rl.run_folder.log import RunLog
from moe_rl.run_folder.trackers import make_trackers
from moe_rl.run_folder.trackers.base import numbers
from moe_rl.training.run import train

trackio = pytest.importorskip("trackio")
storage = pytest.importorskip("trackio.sqlite_storage")

FILES = {"step": "steps.jsonl", "update": "updates.jsonl"}


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A project of the test's own, in a database of the test's own."""
    for module in (trackio, trackio.utils, storage):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio", raising=False)
    monkeypatch.setenv("TRACKIO_PROJECT", "laws")
    yield "laws"


def shown(axis: str) -> dict[int, dict[str, float]]:
    """x -> name -> value of the project's only run; one x twice is a failure."""
    (run,) = storage.SQLiteStorage.get_runs("laws")
    rows = [
        (row["step"], {k: float(v) for k, v in row.items() if k not in ("step", "timestamp")})
        for row in storage.SQLiteStorage.get_logs("laws", run)
    ]
    mine = [
        (x, values)
        for x, values in rows
        if any(name.startswith("update/") for name in values) == (axis == "update")
    ]
    assert len(dict(mine)) == len(mine), "an x is shown twice"
    return dict(mine)


def expected(folder: Path, axis: Any) -> dict[int, dict[str, float]]:
    lines = (folder / FILES[axis]).read_text().splitlines()
    return {x: numbers(axis, json.loads(line)) for x, line in enumerate(lines)}


def test_what_the_database_holds_is_what_the_run_holds(
    config: RunConfig, tmp_path: Path, cold: Path
) -> None:
    train(config, tmp_path / "run", cold_start_cache=cold, trackers=make_trackers(["trackio"]))
    for axis in FILES:
        assert shown(axis) == expected(tmp_path / "run", axis)


def test_an_interrupted_run_goes_on_under_its_name_and_shows_every_update_once(
    config: RunConfig, tmp_path: Path, cold: Path
) -> None:
    run = tmp_path / "run"
    with pytest.raises(Killed), killed_after(8):
        train(config, run, cold_start_cache=cold, trackers=make_trackers(["trackio"]))
    trackers = make_trackers(["trackio"])
    train(config, run, cold_start_cache=cold, resume=True, trackers=trackers)
    for axis in FILES:
        ours, theirs = shown(axis), expected(run, axis)
        assert ours.keys() == theirs.keys()
        for x in theirs:
            left, right = (
                {k: v for k, v in side[x].items() if "seconds" not in k} for side in (ours, theirs)
            )
            assert left == right


def test_a_run_that_starts_anew_is_a_run_of_its_own(config: RunConfig, tmp_path: Path) -> None:
    for _ in range(2):
        log = RunLog(tmp_path / "run", config, trackers=make_trackers(["trackio"]))
        log.step({"step": 0, "reward": 1.0})
        log.close()
    names = storage.SQLiteStorage.get_runs("laws")
    assert len(names) == 2
    assert all(name.startswith("tiny-grpo-seed0-") for name in names), "trackio made one up"


def test_numbers_that_are_not_finite_are_kept(config: RunConfig, tmp_path: Path) -> None:
    log = RunLog(tmp_path / "run", config, trackers=make_trackers(["trackio"]))
    log.update({"step": 1, "update": 2, "loss": math.nan, "grad_norm": math.inf})
    log.close()
    row = shown("update")[6]
    assert math.isnan(row["update/loss"])
    assert row["update/grad_norm"] == math.inf
    assert row["update/nonfinite"] == 2.0
