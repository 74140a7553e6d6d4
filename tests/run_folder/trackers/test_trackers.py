"""Every line of a run reaches its trackers, and no tracker reaches the run."""

import hashlib
import json
import math
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from recorder import Recorder
from runs import Killed, assert_same_run, killed_after

from moe_rl.commands.cli import main
from moe_rl.config import ConfigError, RunConfig
from moe_rl.run_folder.log import Mark, Marks, RunLog, is_complete
from moe_rl.run_folder.trackers import TrackedRun, TrackerWarning, make_trackers
from moe_rl.run_folder.trackers.base import numbers, place_file, take_place
from moe_rl.training.run import train

NAMES = ("tensorboard", "wandb", "trackio")


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


# What reaches a tracker.


def test_a_tracker_gets_every_number_of_the_files_at_its_place(
    config: RunConfig, tmp_path: Path, cold: Path
) -> None:
    tracker = Recorder()
    summary = train(config, tmp_path / "run", cold_start_cache=cold, trackers=[tracker])
    for axis, name, prefix in (("step", "steps.jsonl", ""), ("update", "updates.jsonl", "update/")):
        files = lines(tmp_path / "run", name)
        assert [x for x, _ in tracker.points[axis]] == list(range(len(files)))
        for line, (_, shown) in zip(files, tracker.points[axis], strict=True):
            left = dict(shown)
            for key, value in line.items():
                if key in ("step", "update"):
                    continue
                if isinstance(value, list):
                    stem, kind = key.split("_per_")
                    for i, item in enumerate(value):
                        assert left.pop(f"{prefix}{stem}/{kind}_{i}") == item
                else:
                    assert left.pop(prefix + key) == value
            assert not left, "shown, and in no file"
    assert any("/layer_1" in name for _, shown in tracker.points["step"] for name in shown)
    assert tracker.summaries == [summary]
    assert tracker.run is not None and tracker.run.config == config.to_dict()
    assert tracker.run.name == "tiny-grpo-seed0"
    assert tracker.run.resume is None


def test_numbers_that_are_not_finite_arrive_and_are_counted() -> None:
    line = {"step": 3, "loss": math.nan, "a_per_layer": [math.inf, 1.0, -math.inf], "b": 2}
    shown = numbers("step", line)
    assert math.isnan(shown["loss"])
    assert (shown["a/layer_0"], shown["a/layer_2"], shown["b"]) == (math.inf, -math.inf, 2.0)
    assert shown["nonfinite"] == 3.0
    assert numbers("update", line)["update/nonfinite"] == 3.0
    assert "nonfinite" not in numbers("step", {"step": 0, "loss": 1.0})


def test_text_is_no_number_and_a_bare_list_is_numbered() -> None:
    line = {"step": 0, "note": "text", "nothing": None, "sizes": [1, 2], "flag": True}
    assert numbers("step", line) == {"sizes/0": 1.0, "sizes/1": 2.0, "flag": 1.0}


# What a tracker cannot do to a run.


def test_trackers_change_no_bit_of_a_run(config: RunConfig, tmp_path: Path, cold: Path) -> None:
    train(config, tmp_path / "with", cold_start_cache=cold, trackers=[Recorder()])
    train(config, tmp_path / "without", cold_start_cache=cold)
    assert_same_run(tmp_path / "with", tmp_path / "without")
    files = [(tmp_path / name / "config.json").read_bytes() for name in ("with", "without")]
    assert files[0] == files[1]


class OwnError(Exception):
    """What a backend defines for itself."""


class Breaks(Recorder):
    """Fails at one place, and from there on."""

    name = "breaks"
    errors = (OwnError,)

    def __init__(self, where: str, error: Exception) -> None:
        super().__init__()
        self.where, self.error = where, error

    def start(self, run: TrackedRun) -> None:
        super().start(run)
        take_place(run, self.name)
        self._fail("start")

    def log(self, axis: Any, x: int, values: Mapping[str, float]) -> None:
        super().log(axis, x, values)
        if x >= 1:
            self._fail(axis)

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        self._fail("finish")

    def _fail(self, where: str) -> None:
        if where == self.where:
            raise self.error


@pytest.mark.parametrize("where", ["start", "step", "update", "finish"])
@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), ValueError("no"), RuntimeError(""), OwnError("died")],
    ids=["OSError", "ValueError", "RuntimeError", "OwnError"],
)
def test_a_tracker_that_fails_is_dropped_with_one_warning_and_the_run_goes_on(
    where: str, error: Exception, tmp_path: Path, config: RunConfig
) -> None:
    broken, sound = Breaks(where, error), Recorder()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        log = RunLog(tmp_path, config, trackers=[broken, sound])
        for step in range(3):
            log.update({"step": step, "update": 0, "loss": 1.0})
            log.step({"step": step, "reward": 1.0})
        log.finish({"final_reward": 1.0})
        log.close()
    assert [warning.category for warning in caught] == [TrackerWarning]
    assert "tracker breaks failed" in str(caught[0].message)
    assert type(error).__name__ in str(caught[0].message)
    assert is_complete(tmp_path)
    assert len(lines(tmp_path, "steps.jsonl")) == len(sound.points["step"]) == 3
    assert len(sound.points["update"]) == 3
    assert sound.summaries == [{"final_reward": 1.0}]
    assert len(broken.points["step"]) == {"start": 0, "step": 2, "update": 1, "finish": 3}[where]
    assert not place_file(tmp_path, "breaks").exists(), "a gap would look like the whole run"


def test_a_bug_in_a_tracker_is_not_hidden(tmp_path: Path, config: RunConfig) -> None:
    log = RunLog(tmp_path, config, trackers=[Breaks("step", KeyError("bug"))])
    log.step({"step": 0})
    with pytest.raises(KeyError):
        log.step({"step": 1})


# Going on.


def test_an_interrupted_run_tells_its_trackers_where_it_goes_on(
    config: RunConfig, tmp_path: Path, cold: Path
) -> None:
    """Killed in the third rollout, goes on in the second: of its 4 updates 2 are made."""
    first, second = Recorder(), Recorder()
    with pytest.raises(Killed), killed_after(8):
        train(config, tmp_path / "run", cold_start_cache=cold, trackers=[first])
    assert first.summaries == [None]
    train(config, tmp_path / "run", cold_start_cache=cold, resume=True, trackers=[second])
    assert second.run is not None and second.run.resume is not None
    assert second.run.resume.first == {"step": 1, "update": 6}
    assert second.run.resume.shown == {"step": 2, "update": 8}
    assert [x for x, _ in second.points["update"]] == list(range(6, 12))
    assert [x for x, _ in second.points["step"]] == [1, 2]


def test_a_run_goes_on_with_other_trackers(config: RunConfig, tmp_path: Path, cold: Path) -> None:
    with pytest.raises(Killed), killed_after(5):
        train(config, tmp_path / "run", cold_start_cache=cold, trackers=[Recorder()])
    train(config, tmp_path / "run", cold_start_cache=cold, resume=True)
    assert is_complete(tmp_path / "run")


def test_a_place_is_kept_while_a_run_goes_on_and_new_when_it_starts_anew(
    tmp_path: Path, config: RunConfig
) -> None:
    def place(marks: Marks | None, written: int) -> Any:
        taken = []

        class Takes(Recorder):
            def start(self, run: TrackedRun) -> None:
                taken.append(take_place(run, self.name))

        log = RunLog(tmp_path, config, marks, [Takes()])
        for step in range(written):
            log.step({"step": step})
        log.close()
        return taken[0]

    nothing: Mark = {"size": 0, "sha256": hashlib.sha256().hexdigest()}
    none = {"steps.jsonl": nothing, "updates.jsonl": nothing}
    first = place(None, written=5)
    again = place(none, written=2)
    third = place(none, written=0)
    assert not first.goes_on and first.shown["step"] == 0
    assert again.goes_on and third.goes_on and first.id == again.id == third.id
    assert again.shown["step"] == 5
    assert third.shown["step"] == 5, "the second attempt got less far than the first"
    anew = place(None, written=0)
    assert not anew.goes_on and anew.id != first.id and anew.shown["step"] == 0


# Asking for one.


@pytest.mark.parametrize("name", NAMES)
def test_without_its_package_nothing_is_begun(
    name: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--preset", "tiny", "--tracker", name]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert f"tracker={name!r}" in shown and f"pip install 'moe-rl[{name}]'" in shown
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=name):
        make_trackers([name])


def test_an_unknown_tracker_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--preset", "tiny", "--tracker", "mlflow"]) == 2
    assert "mlflow" in capsys.readouterr().err
