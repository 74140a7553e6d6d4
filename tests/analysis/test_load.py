"""Tests of analysis: reading run folders, whole, torn and foreign."""

import json
import math
import shutil

import pytest
import synthetic

from moe_rl.analysis.data.load import AnalysisError, AnalysisWarning, load_study


@pytest.fixture
def study_dir(tmp_path):
    return synthetic.write_study(
        tmp_path / "study", arms=["grpo", "gspo"], seeds=2, steps=4, updates=2
    )


def _run(study_dir, arm="grpo", seed=1):
    return study_dir / "runs" / "staleness" / arm / f"seed{seed}"


def test_every_row_of_every_run_is_read_with_its_config(study_dir):
    study = load_study(study_dir)
    assert (len(study.runs), len(study.steps), len(study.updates)) == (4, 16, 32)
    assert study.arms == ["grpo", "gspo"] and study.settings == ["staleness"]
    for name in ("setting", "arm", "seed", "updates_per_rollout", "num_experts", "num_layers"):
        assert name in study.steps and name in study.updates and name in study.runs
    assert set(study.runs["complete"]) == {True}
    assert study.updates["routing/churn_per_layer"].map(len).eq(synthetic.LAYERS).all()


def test_the_strings_for_non_finite_numbers_become_floats(study_dir):
    file = _run(study_dir) / "updates.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[0] |= {"grad_norm": "NaN", "kl": "Infinity", "routing/churn_per_layer": ["-Infinity", 1]}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    row = load_study(study_dir).updates.iloc[0]
    assert math.isnan(row["grad_norm"]) and row["kl"] == math.inf
    assert row["routing/churn_per_layer"] == [-math.inf, 1]


def test_a_torn_last_line_is_skipped_with_its_file_and_line(study_dir):
    file = _run(study_dir) / "steps.jsonl"
    file.write_text(file.read_text() + '{"step": 4, "rew')
    with pytest.warns(AnalysisWarning, match=r"steps\.jsonl:5: torn last line skipped"):
        study = load_study(study_dir)
    assert len(study.steps) == 16
    assert any("steps.jsonl:5" in note for note in study.notes)


@pytest.mark.parametrize("line", ["{broken", '{"reward": 1.0}'])
def test_any_other_malformed_line_is_an_error_with_its_file_and_line(study_dir, line):
    file = _run(study_dir) / "steps.jsonl"
    lines = file.read_text().splitlines()
    lines[1] = line
    file.write_text("\n".join(lines) + "\n")
    with pytest.raises(AnalysisError, match=r"steps\.jsonl:2: malformed line"):
        load_study(study_dir)


def test_steps_without_a_reward_are_refused_in_one_line_that_names_the_file(study_dir):
    file = _run(study_dir, arm="gspo") / "steps.jsonl"
    file.write_text(file.read_text().replace('"reward"', '"score"'))
    with pytest.raises(AnalysisError, match=r"gspo/seed1/steps\.jsonl: no line has a reward") as no:
        load_study(study_dir)
    assert "\n" not in str(no.value)


def test_a_run_without_summary_is_kept_and_flagged(study_dir):
    (_run(study_dir) / "summary.json").unlink()
    runs = load_study(study_dir).runs
    assert runs["complete"].tolist().count(False) == 1
    assert len(runs) == 4


def test_a_run_that_has_only_its_config_is_kept(study_dir):
    for name in ("steps.jsonl", "updates.jsonl", "summary.json"):
        (_run(study_dir) / name).unlink()
    with pytest.warns(AnalysisWarning, match="missing"):
        study = load_study(study_dir)
    assert len(study.runs) == 4 and study.runs["steps_done"].min() == 0


def test_a_step_written_twice_counts_once_and_the_later_one(study_dir):
    file = _run(study_dir) / "steps.jsonl"
    first = json.loads(file.read_text().splitlines()[0])
    file.write_text(file.read_text() + json.dumps(first | {"reward": 0.125}) + "\n")
    with pytest.warns(AnalysisWarning, match="1 lines are written twice"):
        study = load_study(study_dir)
    assert len(study.steps) == 16 and study.steps.iloc[0]["reward"] == 0.125


def test_a_single_run_folder_is_a_study_of_one(study_dir):
    study = load_study(_run(study_dir))
    assert len(study.runs) == 1 and study.mode == "single" and study.name == "seed1"


def test_a_missing_folder_names_the_command_that_makes_one(tmp_path):
    with pytest.raises(AnalysisError, match="no such folder; `moe-rl reproduce"):
        load_study(tmp_path / "absent")


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(AnalysisError, match=r"found no study\.json and no run folder"):
        load_study(tmp_path)


def test_a_study_without_runs_is_refused(study_dir):
    shutil.rmtree(study_dir / "runs")
    with pytest.raises(AnalysisError, match="found no run folders under runs/"):
        load_study(study_dir)


def test_another_schema_is_refused_with_both_numbers(study_dir):
    (study_dir / "study.json").write_text('{"schema": 7}')
    with pytest.raises(AnalysisError, match="schema 7, this version reads schema 1"):
        load_study(study_dir)


def test_broken_json_is_refused_with_its_line(study_dir):
    (_run(study_dir) / "config.json").write_text('{"schema": 1,\n"config": }')
    with pytest.raises(AnalysisError, match=r"config\.json: not JSON \(.*line 2"):
        load_study(study_dir)


def test_two_runs_of_one_name_are_refused(study_dir):
    shutil.copytree(_run(study_dir), study_dir / "runs/staleness/grpo/copy")
    with pytest.raises(AnalysisError, match="a second run of setting 'staleness', arm 'grpo'"):
        load_study(study_dir)


def test_one_setting_of_a_study_has_only_its_rows(tmp_path):
    root = synthetic.write_study(
        tmp_path / "two", arms=["grpo"], seeds=1, steps=3, updates=1, settings=("a", "b")
    )
    one = load_study(root).setting("b")
    assert one.settings == ["b"] and set(one.updates["setting"]) == {"b"}
    assert set(one.configs) == {("b", "grpo", 1)} == set(one.planned)


def test_some_arms_of_a_study_have_only_their_rows(study_dir):
    some = load_study(study_dir).with_arms(["gspo"])
    assert some.arms == ["gspo"] and set(some.steps["arm"]) == set(some.runs["arm"]) == {"gspo"}
    assert set(some.configs) == set(some.planned) == {("staleness", "gspo", k) for k in (1, 2)}


def test_a_checkpoint_inside_a_run_is_no_run(study_dir):
    before = len(load_study(study_dir).runs)
    checkpoint = next((study_dir / "runs").glob("*/*/*")) / "policy_00005"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text('{"model_type": "qwen3_moe"}')
    assert len(load_study(study_dir).runs) == before
