"""The callback of TRL's trainer: it warns once, of what ended rollouts show."""

import dataclasses
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_trl import build, logged

from moe_rl.analysis.warning.thresholds import Threshold, Thresholds, read_thresholds
from moe_rl.integrations.trl_warning import WarnOfCollapse


def write_rule(file: Path, **changes: Any) -> Path:
    """Thresholds in which churn above 0.3 warns, for the first 3 rollouts."""
    committed = read_thresholds()
    known = {"evidence": "run", "gain_low": 0.5}
    churn = next(rule for rule in committed.signals if rule.signal == "churn")
    rule: Threshold = dataclasses.replace(churn, **known | {"threshold": 0.3} | changes)
    rules: Thresholds = dataclasses.replace(committed, horizon=3, signals=[rule])
    rules.write(file)
    return file


def feed(callback: WarnOfCollapse, churn: list[float]) -> list[str]:
    """What it warns of in updates with these churns, two a rollout."""
    args = SimpleNamespace(steps_per_generation=4, num_iterations=2, gradient_accumulation_steps=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for update, value in enumerate(churn, 1):
            state = SimpleNamespace(global_step=update, is_world_process_zero=True)
            callback.on_log(args, state, None, {"loss": 0.1, "routing/churn": value})
        callback.on_log(args, state, None, {"eval_loss": 0.1})
    return [str(warning.message) for warning in caught]


def test_it_warns_once_when_a_rollout_has_ended(tmp_path: Path) -> None:
    rules = write_rule(tmp_path / "rules.json")
    said = feed(WarnOfCollapse(rules), [0.1, 0.1, 0.5, 0.4, 0.9, 0.9, 0.9, 0.9])
    assert len(said) == 1 and said[0].startswith("update 4: WARNING")
    assert "routing churn" in said[0]


def test_it_judges_means_of_the_first_rollouts_alone(tmp_path: Path) -> None:
    rules = write_rule(tmp_path / "rules.json")
    assert not feed(WarnOfCollapse(rules), [0.0, 0.5] * 3)  # no rollout has a mean above 0.3
    assert not feed(WarnOfCollapse(rules), [0.1] * 6 + [0.9] * 4)  # the fourth is beyond them


def test_it_says_when_it_can_warn_of_nothing(tmp_path: Path) -> None:
    rules = write_rule(tmp_path / "rules.json", evidence="nothing")
    with pytest.warns(UserWarning, match="nothing will warn"):
        silent = WarnOfCollapse(rules)
    assert not feed(silent, [0.9] * 6)


def test_it_warns_in_a_training(tmp_path: Path) -> None:
    rules = write_rule(tmp_path / "rules.json", threshold=1e-6)
    trainer = build(tmp_path, callbacks=[WarnOfCollapse(rules)])
    with pytest.warns(UserWarning, match="update 2: WARNING"):
        trainer.train()
    assert logged(trainer)[1]["routing/churn"] > 2e-6  # the second update of the first rollout
