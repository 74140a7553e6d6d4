"""TensorBoard, for real: event files written, and read back by its own reader."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import Killed, killed_after
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moe_rl.commands.cli import main
from moe_rl.config import RunConfig
from moe_rl.run_folder.log import RunLog
from moe_rl.run_folder.trackers import make_trackers
from moe_rl.run_folder.trackers.base import numbers
from moe_rl.training.run import train

FILES = {"step": "steps.jsonl", "update": "updates.jsonl"}


def read(folder: Path, axis: str) -> dict[str, dict[int, float]]:
    """Tag -> x -> value, as TensorBoard shows them; one x twice is a failure."""
    events = EventAccumulator(str(folder / "tensorboard" / f"{axis}s"), {"scalars": 0})
    events.Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        points = [(event.step, event.value) for event in events.Scalars(tag)]
        found[tag] = dict(points)
        assert len(found[tag]) == len(points), f"{tag}: an x is shown twice"
    return found


def expected(folder: Path, axis: Any) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for x, line in enumerate((folder / FILES[axis]).read_text().splitlines()):
        for name, value in numbers(axis, json.loads(line)).items():
            found.setdefault(name, {})[x] = float(np.float32(value))
    return found


def test_what_tensorboard_shows_is_what_the_files_hold(
    config: RunConfig, tmp_path: Path, cold: Path
) -> None:
    train(config, tmp_path, cold_start_cache=cold, trackers=make_trackers(["tensorboard"] * 2))
    for axis in FILES:
        assert read(tmp_path, axis) == expected(tmp_path, axis)
    events = EventAccumulator(str(tmp_path / "tensorboard" / "steps"))
    events.Reload()
    texts = events.Tags()["tensors"]
    assert {text.split("/")[0] for text in texts} == {"config", "summary"}
    config_text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '"learning_rate"' in config_text


def test_a_run_that_goes_on_shows_every_update_once(
    config: RunConfig, tmp_path: Path, cold: Path
) -> None:
    run = tmp_path / "run"

    def attempt(updates: int, **options: Any) -> None:
        with pytest.raises(Killed), killed_after(updates):
            train(
                config,
                run,
                cold_start_cache=cold,
                trackers=make_trackers(["tensorboard"]),
                **options,
            )

    attempt(8)
    attempt(1, resume=True)
    assert sorted(read(run, "update")["update/loss"]) == list(range(7))
    trackers = make_trackers(["tensorboard"])
    train(config, run, cold_start_cache=cold, resume=True, trackers=trackers)
    for axis in FILES:
        assert read(run, axis) == expected(run, axis)


def test_a_run_that_starts_anew_shows_nothing_of_the_attempt_before(
    config: RunConfig, tmp_path: Path
) -> None:
    for attempt, steps in enumerate((5, 2)):
        log = RunLog(tmp_path, config, trackers=make_trackers(["tensorboard"]))
        for step in range(steps):
            log.step({"step": step, "reward": attempt})
        log.close()
    assert read(tmp_path, "step") == {"reward": {0: 1.0, 1: 1.0}}


def test_numbers_that_are_not_finite_are_kept(config: RunConfig, tmp_path: Path) -> None:
    log = RunLog(tmp_path, config, trackers=make_trackers(["tensorboard"]))
    log.update({"step": 1, "update": 2, "loss": math.nan, "grad_norm": math.inf})
    log.close()
    shown = read(tmp_path, "update")
    assert math.isnan(shown["update/loss"][6])
    assert shown["update/grad_norm"] == {6: math.inf}
    assert shown["update/nonfinite"] == {6: 2.0}


FULL_DISK = """
import resource, sys, warnings
from pathlib import Path
from moe_rl.trackers import TrackedRun, make_trackers
from moe_rl.trackers.fan_out import FanOut

run = TrackedRun(name="run", config={}, folder=Path(sys.argv[1]), resume=None)
trackers = FanOut(make_trackers(["tensorboard"]), run, 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
for step in range(20):
    trackers.step({"step": step} | {f"metric_{i}": 1.0 for i in range(50)})
trackers.finish({})
print("the run went on")
"""


def test_a_full_disk_ends_the_tracker_and_not_the_run(tmp_path: Path) -> None:
    """No file of that process may grow beyond 20 kB."""
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "the run went on\n"
    assert done.stderr.count("tracker tensorboard failed (OSError") == 1, done.stderr


def test_the_command_line_takes_a_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["train", "--preset", "tiny", "--steps", "1", "--sft-steps", "2", "--out", "run"]
    assert main([*command, "--tracker", "tensorboard"]) == 0
    assert list(read(tmp_path / "run", "step")["reward"]) == [0]
