"""A run that meets NaN or inf stops before it learns from it, and its update can be redone."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moe_rl.commands.cli import main
from moe_rl.config import ConfigError, RunConfig
from moe_rl.presets import preset
from moe_rl.training.crash import NonFinite
from moe_rl.training.debug_crash import debug_crash
from moe_rl.training.learner import Learner, Passed
from moe_rl.training.run import train
from moe_rl.training.trainer import Trainer


def tiny(**changes: Any) -> RunConfig:
    small = {"steps": 2, "prompts_per_rollout": 4, "group_size": 4, "sft_steps": 300}
    return preset("tiny").replace(**small | changes).named()


@pytest.fixture(scope="module")
def cold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cold")


def diverged(folder: Path, cold: Path, **changes: Any) -> Path:
    """The bundle of a run whose weights explode."""
    with pytest.raises(NonFinite) as stopped:
        train(tiny(learning_rate=1e30, **changes), folder, cold_start_cache=cold)
    assert f"moe-rl debug-crash {stopped.value.crash.bundle}" in str(stopped.value)
    assert "take a smaller" in str(stopped.value)
    return stopped.value.crash.bundle


def poison(monkeypatch: pytest.MonkeyPatch, update: int, *, token: tuple[int, int]) -> None:
    """Make one response token's old log-prob minus infinity in one update of the first rollout."""
    real = Learner.gradients

    def gradients(self: Learner, experience: Any, step: int, number: int) -> Any:
        if (step, number) == (0, update):
            row = self.share.of_update(update).start * self.config.group_size + token[0]
            experience.advantages[row] = -1.0
            experience.old_logprobs[row, token[1]] = -torch.inf
        return real(self, experience, step, number)

    monkeypatch.setattr(Learner, "gradients", gradients)


def test_the_bundle_shows_the_token_that_was_at_fault(
    tmp_path: Path, cold: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 2, token=(3, 1))
    with pytest.raises(
        NonFinite, match="rollout step 0, update 2: the loss or its gradient"
    ) as hit:
        train(tiny(), tmp_path / "run", cold_start_cache=cold)
    monkeypatch.undo()
    bundle = hit.value.crash.bundle
    assert bundle == tmp_path / "run" / "crash" / "00000-02"
    report = debug_crash(bundle)
    assert any(
        line.startswith("ratios: 1 of ") and "token 1 of sample 3 of prompt 2: inf" in line
        for line in report.found
    ), report.found
    assert any(line.startswith("gradients: ") for line in report.found)
    for name in ("kl", "ratio/extreme_2", "routing/churn", "clip_ratio/region"):
        was = report.before[name]
        assert report.metrics[name] == (float(was) if isinstance(was, str) else was), name


def test_nothing_is_learnt_from_it(
    tmp_path: Path, cold: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 0, token=(0, 0))
    with pytest.raises(NonFinite) as hit:
        train(tiny(), tmp_path / "run", cold_start_cache=cold)
    start = load_file(next(cold.glob("*/model.safetensors")))
    kept = load_file(hit.value.crash.bundle / "policy" / "model.safetensors")
    assert all(torch.equal(kept[name], start[name]) for name in start)
    (line,) = (tmp_path / "run" / "updates.jsonl").read_text().splitlines()
    logged = json.loads(line)
    assert logged["skipped"] == 1
    assert "Infinity" in (logged["loss"], logged["ratio/token_log_max"])
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_nan_loss_with_a_finite_gradient_is_not_learnt_from(
    tmp_path: Path, cold: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its gradient may be finite: that of a constant is 0."""
    real = Learner.gradients

    def gradients(self: Learner, *arguments: Any) -> list[Passed]:
        return [
            dataclasses.replace(part, loss=part.loss + math.nan) for part in real(self, *arguments)
        ]

    monkeypatch.setattr(Learner, "gradients", gradients)
    with pytest.raises(NonFinite):
        train(tiny(), tmp_path / "run", cold_start_cache=cold)
    logged = json.loads((tmp_path / "run" / "updates.jsonl").read_text())
    assert logged["skipped"] == 1 and logged["loss"] == "NaN"
    assert isinstance(logged["grad_norm"], float)


def test_a_study_may_skip_such_an_update(
    tmp_path: Path, cold: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 1, token=(0, 0))
    config = tiny(on_nonfinite="skip")
    train(config, tmp_path / "run", cold_start_cache=cold)
    lines = (tmp_path / "run" / "updates.jsonl").read_text().splitlines()
    assert [json.loads(line)["skipped"] for line in lines] == [0, 1, 0, 0] + [0] * 4
    assert not (tmp_path / "run" / "crash").exists()


@pytest.mark.parametrize("changes", [{}, {"instruments": False}, {"routing_replay": "R2"}])
def test_exploded_weights_are_named(changes: dict[str, Any], tmp_path: Path, cold: Path) -> None:
    bundle = diverged(tmp_path / "run", cold, **changes)
    report = debug_crash(bundle)
    assert any(line.startswith("first module: model.") for line in report.found), report.found
    assert {"config.json", "crash.json", "manifest.json", "policy"} <= {
        path.name for path in bundle.iterdir()
    }


def test_a_rollout_that_cannot_be_sampled_is_redone_too(tmp_path: Path, cold: Path) -> None:
    """With one update a rollout, the explosion is first seen by the next rollout."""
    bundle = diverged(tmp_path / "run", cold, updates_per_rollout=1)
    assert bundle.name == "00001-00" and not (bundle / "rollout.safetensors").exists()
    assert debug_crash(bundle).found


def test_an_evaluation_that_met_it_is_redone(
    tmp_path: Path, cold: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = diverged(tmp_path / "run", cold, updates_per_rollout=1, evaluate_every=1)
    assert bundle.name == "00000-01"
    monkeypatch.setattr(Trainer, "experience", None)  # the rollout was fine
    assert debug_crash(bundle).found


def test_the_command_shows_what_was_found(
    tmp_path: Path, cold: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["debug-crash", str(diverged(tmp_path / "run", cold))]) == 0
    shown = capsys.readouterr().out
    assert "the run said: " in shown and "reproduced\n" in shown and "first module: " in shown


def test_what_is_finite_now_is_said_to_be(
    tmp_path: Path,
    cold: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = Learner.update
    monkeypatch.setattr(Learner, "update", lambda *a: real(*a) | {"skipped": 1})
    with pytest.raises(NonFinite) as hit:
        train(tiny(), tmp_path / "run", cold_start_cache=cold)
    assert main(["debug-crash", str(hit.value.crash.bundle)]) == 1
    assert "not reproduced: everything is finite now" in capsys.readouterr().out


def test_a_folder_that_is_no_whole_bundle_is_refused(tmp_path: Path, cold: Path) -> None:
    with pytest.raises(ConfigError, match="absent: no whole crash bundle"):
        debug_crash(tmp_path / "absent")
    train(tiny(checkpoint_every=1), tmp_path / "fine", cold_start_cache=cold)
    with pytest.raises(ConfigError, match="no whole crash bundle"):
        debug_crash(tmp_path / "fine" / "checkpoints" / "00001")
    bundle = diverged(tmp_path / "run", cold)
    weights = bundle / "policy" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"model\.safetensors: not as it was written"):
        debug_crash(bundle)
