"""Weights & Biases, for real and offline: its files written, and read back by its own reader."""

import json
import math
import os
import struct
import subprocess
import sys
import time
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

wandb = pytest.importorskip("wandb")

FILES = {"step": "steps.jsonl", "update": "updates.jsonl"}
X = {"step": "rollout_step", "update": "update_step"}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)


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


def records(folder: Path) -> list[Any]:
    """Every record in the offline files of a run folder, in the order of writing."""
    found = []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        deadline = time.monotonic() + 60
        # Its service writes the last of a file after `finish` has returned.
        while not any(kind(record) == "exit" for record in parsed(file)):
            assert time.monotonic() < deadline, f"{file} has no end"
            time.sleep(0.05)
        found += parsed(file)
    return found


def parsed(file: Path) -> list[Any]:
    from wandb.proto import wandb_internal_pb2

    return [wandb_internal_pb2.Record.FromString(chunk) for chunk in chunks(file.read_bytes())]


def kind(record: Any) -> str:
    return record.WhichOneof("record_type")


def history(folder: Path) -> list[dict[str, Any]]:
    rows = []
    for record in records(folder):
        if kind(record) == "history":
            items = record.history.item
            rows.append(
                {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in items}
            )
    return rows


def shown(folder: Path, axis: str) -> dict[int, dict[str, float]]:
    """x -> name -> value; one x twice is a failure."""
    rows = [row for row in history(folder) if X[axis] in row]
    found = {
        row[X[axis]]: {k: v for k, v in row.items() if not k.startswith("_") and k != X[axis]}
        for row in rows
    }
    assert len(found) == len(rows), "an x is shown twice"
    return found


def expected(folder: Path, axis: Any) -> dict[int, dict[str, float]]:
    lines = (folder / FILES[axis]).read_text().splitlines()
    return {x: numbers(axis, json.loads(line)) for x, line in enumerate(lines)}


def test_what_the_offline_files_hold_is_what_the_run_holds(
    config: RunConfig, tmp_path: Path, cold: Path
) -> None:
    train(config, tmp_path, cold_start_cache=cold, trackers=make_trackers(["wandb"]))
    for axis in FILES:
        assert shown(tmp_path, axis) == expected(tmp_path, axis)
    kinds = {kind(record) for record in records(tmp_path)}
    assert {"run", "history", "exit"} <= kinds
    assert not list(tmp_path.glob("wandb/run-*")), "a run that is not offline"


def test_an_interrupted_run_goes_on_under_its_id_and_shows_every_update_once(
    config: RunConfig, tmp_path: Path, cold: Path
) -> None:
    with pytest.raises(Killed), killed_after(8):
        train(config, tmp_path, cold_start_cache=cold, trackers=make_trackers(["wandb"]))
    trackers = make_trackers(["wandb"])
    train(config, tmp_path, cold_start_cache=cold, resume=True, trackers=trackers)
    ids = {r.run.run_id for r in records(tmp_path) if kind(r) == "run"}
    assert len(ids) == 1
    for axis in FILES:
        ours, theirs = shown(tmp_path, axis), expected(tmp_path, axis)
        assert ours.keys() == theirs.keys()
        timed = "seconds"
        for x in theirs:
            left, right = (
                {k: v for k, v in side[x].items() if timed not in k} for side in (ours, theirs)
            )
            assert left == right


def test_numbers_that_are_not_finite_are_kept(config: RunConfig, tmp_path: Path) -> None:
    log = RunLog(tmp_path, config, trackers=make_trackers(["wandb"]))
    log.update({"step": 1, "update": 2, "loss": math.nan, "grad_norm": math.inf})
    log.close()
    row = shown(tmp_path, "update")[6]
    assert math.isnan(float(row["update/loss"]))
    assert float(row["update/grad_norm"]) == math.inf
    assert row["update/nonfinite"] == 2.0


def test_it_is_offline_unless_the_environment_says_otherwise(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    real = wandb.init

    def init(**options: Any) -> Any:
        asked.append(options["mode"])
        return real(**options | {"mode": "disabled"})

    monkeypatch.setattr(wandb, "init", init)
    for mode in (None, "online"):
        if mode is not None:
            monkeypatch.setenv("WANDB_MODE", mode)
        RunLog(tmp_path, config, trackers=make_trackers(["wandb"])).close()
    assert asked == ["offline", "online"]


KILLED = """
import os, signal, subprocess, sys
from pathlib import Path
from moe_rl.trackers import TrackedRun, make_trackers
from moe_rl.trackers.fan_out import FanOut

run = TrackedRun(name="run", config={}, folder=Path(sys.argv[1]), resume=None)
trackers = FanOut(make_trackers(["wandb"]), run, 1)
children = ["ps", "-ww", "--ppid", str(os.getpid()), "-o", "pid=,args="]
listed = subprocess.run(children, capture_output=True, text=True).stdout.splitlines()
(service,) = [line for line in listed if "wandb-core" in line]
assert "--no-observability" in service, "crash reports would go out"
os.kill(int(service.split()[0]), signal.SIGKILL)
for step in range(20):
    trackers.step({"step": step, "reward": 1.0})
trackers.finish({})
print("the run went on")
"""


def test_a_backend_that_dies_ends_the_tracker_and_not_the_run(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        # The service of this process, if it has one, is not the child's to kill.
        env={k: v for k, v in os.environ.items() if k != "WANDB_SERVICE"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("the run went on\n")
    assert done.stderr.count("tracker wandb failed (") == 1, done.stderr
