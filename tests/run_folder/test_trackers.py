"""Every line of a run reaches its trackers, no tracker reaches the run, and a resume continues."""

import json
import math
import struct
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from runs import assert_same_run

from moe_rl.commands.cli import main
from moe_rl.config import ConfigError
from moe_rl.presets import preset
from moe_rl.run_folder import trackers as module
from moe_rl.run_folder.log import is_complete
from moe_rl.run_folder.trackers import (
    Finish,
    Log,
    TrackedRun,
    Trackers,
    TrackerWarning,
    line_numbers,
    make_trackers,
)
from moe_rl.training.run import train

NAMES = ("tensorboard", "wandb", "trackio")
BACKENDS = pytest.mark.parametrize("backend", NAMES)
Shown = dict[str, list[tuple[int, float]]]
"""Metric name -> (x, value) in the order of writing."""


@pytest.fixture(autouse=True)
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing leaves the machine or the test's folder."""
    for name in ("WANDB_MODE", "WANDB_PROJECT", "TRACKIO_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def tracked(folder: Path, *, resumed: bool = False) -> TrackedRun:
    return TrackedRun(
        name="run", config={"seed": 7}, folder=folder, updates_per_rollout=2, resumed=resumed
    )


def log_steps(trackers: Trackers, steps: range, value: float) -> None:
    for step in steps:
        for update in range(2):
            trackers.log("update", {"step": step, "update": update, "loss": value})
        trackers.log(
            "step", {"step": step, "reward": value, "routing/churn_per_layer": [0.5, value]}
        )


# What reaches a tracker.


def test_a_line_becomes_numbers_with_names() -> None:
    line = {"step": 3, "update": 1, "note": "text", "none": None, "flag": True, "loss": math.nan}
    shown = line_numbers(line | {"routing/churn_per_layer": [0.5, math.inf]}, "update/")
    assert math.isnan(shown.pop("update/loss"))
    layers = {"update/routing/churn/layer_0": 0.5, "update/routing/churn/layer_1": math.inf}
    assert shown == {"update/flag": 1.0, **layers}


def recorder(shown: list[tuple[str, int, Mapping[str, float]]]) -> module.Tracker:
    def keep(run: TrackedRun) -> tuple[Log, Finish]:
        return lambda axis, x, values: shown.append((axis, x, values)), lambda: None

    return keep


def test_a_run_is_the_same_with_a_tracker_that_gets_every_line(tmp_path: Path) -> None:
    small = {"steps": 2, "prompts_per_rollout": 4, "group_size": 4, "save_every": 2}
    config = preset("tiny").replace(sft_steps=5, **small).named()
    shown: list[tuple[str, int, Mapping[str, float]]] = []
    cold = tmp_path / "cold"
    train(config, tmp_path / "with", cold_start_cache=cold, trackers=[recorder(shown)])
    train(config, tmp_path / "without", cold_start_cache=cold)
    assert_same_run(tmp_path / "with", tmp_path / "without")
    for axis, prefix in (("step", ""), ("update", "update/")):
        lines = (tmp_path / "with" / f"{axis}s.jsonl").read_text().splitlines()
        numbers = [line_numbers(json.loads(line), prefix) for line in lines]
        assert [(x, values) for a, x, values in shown if a == axis] == list(enumerate(numbers))


@pytest.mark.parametrize("where", ["start", "step", "update", "finish"])
def test_a_tracker_that_fails_is_dropped_with_one_warning(where: str, tmp_path: Path) -> None:
    def broken(run: TrackedRun) -> tuple[Log, Finish]:
        fail("start")
        return lambda axis, x, values: fail(axis), lambda: fail("finish")

    def fail(here: str) -> None:
        if here == where:
            raise KeyError("the disk is full")

    shown: list[tuple[str, int, Mapping[str, float]]] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trackers = Trackers([broken, recorder(shown)], tracked(tmp_path))
        log_steps(trackers, range(3), 1.0)
        trackers.finish()
        trackers.finish()
    assert [warning.category for warning in caught] == [TrackerWarning]
    assert "tracker='broken': dropped after KeyError: 'the disk is full'" in str(caught[0].message)
    assert len(shown) == 9


# The packages themselves, read back by their own readers.


def read_tensorboard(folder: Path) -> Shown:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = {}
    for axis in ("steps", "updates"):
        events = EventAccumulator(str(folder / "tensorboard" / axis), {"scalars": 0})
        events.Reload()
        assert events.Tags()["tensors"] == ["config/text_summary"]
        for tag in events.Tags()["scalars"]:
            shown[tag] = [(event.step, event.value) for event in events.Scalars(tag)]
    return shown


def chunks(content: bytes) -> Iterator[bytes]:
    """Records of LevelDB's log format behind wandb's 7 bytes of header (its crc is not checked)."""
    at, parts = 7, b""
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def read_wandb(folder: Path) -> Shown:
    from wandb.proto import wandb_internal_pb2

    shown: Shown = {}
    ids = set()
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda f: f.stat().st_mtime):
        deadline = time.monotonic() + 60
        records: list[Any] = []
        # Its service writes the last of a file after `finish` has returned.
        while not any(record.WhichOneof("record_type") == "exit" for record in records):
            assert time.monotonic() < deadline, f"{file} has no end"
            parse = wandb_internal_pb2.Record.FromString
            records = [parse(chunk) for chunk in chunks(file.read_bytes())]
        ids |= {r.run.run_id for r in records if r.WhichOneof("record_type") == "run"}
        for record in records:
            items = record.history.item
            row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
            x = row.get("rollout_step", row.get("update_step"))
            for name in row.keys() - {"rollout_step", "update_step"}:
                if not name.startswith("_"):
                    shown.setdefault(name, []).append((x, float(row[name])))
    assert ids == {(folder / "wandb" / "id").read_text()}, "not one run"
    assert not list(folder.glob("wandb/run-*")), "a run that is not offline"
    return shown


def read_trackio(folder: Path) -> Shown:
    from trackio.sqlite_storage import SQLiteStorage

    run = f"run-{(folder / 'trackio' / 'id').read_text()}"
    shown: Shown = {}
    for row in SQLiteStorage.get_logs("moe-rl", run):
        for name in row.keys() - {"step", "timestamp"}:
            shown.setdefault(name, []).append((row["step"], float(row[name])))
    return shown


READERS = {"tensorboard": read_tensorboard, "wandb": read_wandb, "trackio": read_trackio}


@pytest.fixture
def read(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Shown]:
    pytest.importorskip(backend)
    if backend == "trackio":
        import trackio
        from trackio import sqlite_storage

        for where in (trackio, trackio.utils, sqlite_storage):
            monkeypatch.setattr(where, "TRACKIO_DIR", tmp_path / "database", raising=False)
    return READERS[backend]


@BACKENDS
def test_a_tracker_shows_what_the_files_hold_nan_and_inf_included(
    backend: Any, read: Callable[[Path], Shown], tmp_path: Path
) -> None:
    trackers = Trackers(make_trackers([backend, backend]), tracked(tmp_path))
    log_steps(trackers, range(2), 0.25)
    trackers.log("update", {"step": 2, "update": 0, "loss": math.inf})
    trackers.log("update", {"step": 2, "update": 1, "loss": math.nan})
    trackers.finish()
    shown = read(tmp_path)
    assert shown["reward"] == shown["routing/churn/layer_1"] == [(0, 0.25), (1, 0.25)]
    assert shown["routing/churn/layer_0"] == [(0, 0.5), (1, 0.5)]
    assert shown["update/loss"][:5] == [(x, 0.25) for x in range(4)] + [(4, math.inf)]
    assert shown["update/loss"][5][0] == 5 and math.isnan(shown["update/loss"][5][1])
    assert len(shown) == 4


@BACKENDS
def test_a_resumed_run_continues_its_tracked_run_and_a_new_one_does_not(
    backend: Any, read: Callable[[Path], Shown], tmp_path: Path
) -> None:
    for steps, resumed in ((range(3), False), (range(2, 4), True)):
        trackers = Trackers(make_trackers([backend]), tracked(tmp_path, resumed=resumed))
        log_steps(trackers, steps, 0.25)
        trackers.finish()
    shown = read(tmp_path)
    assert list(dict(shown["reward"])) == [0, 1, 2, 3]
    assert list(dict(shown["update/loss"])) == list(range(8))
    if backend == "tensorboard":  # the others show the step that was done again twice, equal
        assert len(shown["reward"]) == 4

    if backend != "wandb":  # whose reader here asks for one run
        trackers = Trackers(make_trackers([backend]), tracked(tmp_path))
        log_steps(trackers, range(1), 0.75)
        trackers.finish()
        assert read(tmp_path)["reward"] == [(0, 0.75)]


# Asking for one.


@BACKENDS
def test_without_its_package_nothing_is_begun(
    backend: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, backend, None)
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--preset", "tiny", "--tracker", backend]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert f"tracker={backend!r}" in shown and f"pip install 'moe-rl[{backend}]'" in shown
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=backend):
        make_trackers([backend])


def test_the_command_line_takes_a_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["train", "--preset", "tiny", "--steps", "1", "--sft-steps", "2", "--out", "run"]
    assert main([*command, "--tracker", "tensorboard"]) == 0
    assert is_complete(tmp_path / "run")
    assert list(dict(read_tensorboard(tmp_path / "run")["reward"])) == [0]
