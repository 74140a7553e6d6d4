"""The committed studies: what they run is what their plans say, and every run can be made."""

import math
from collections import Counter
from pathlib import Path
from typing import get_args

import pytest

from moe_rl.commands.cli import main
from moe_rl.config import ConfigError, RunConfig, StudyName
from moe_rl.experiments.arms import ARMS
from moe_rl.experiments.quick import quick
from moe_rl.experiments.runner import check_study, run_folder
from moe_rl.experiments.studies import study_plan
from moe_rl.experiments.study import StudyPlan

ROOT = Path("study")
STUDIES = get_args(StudyName)


def plan_of(name: StudyName) -> StudyPlan:
    return study_plan(name, ROOT)


def arms_of(study: StudyPlan, setting: str) -> Counter[str | None]:
    return Counter(config.arm for config in study.configs if config.setting == setting)


@pytest.mark.parametrize("name", STUDIES)
def test_every_run_has_a_folder_of_its_own_and_a_plan(name: StudyName, tmp_path: Path) -> None:
    study = study_plan(name, tmp_path)
    check_study(study.configs, tmp_path, jobs=1)
    for word in ("Seeds", "Primary outcome", "Arms"):
        assert word in study.analysis
    seeds = [config.seed for config in study.configs]
    assert seeds == sorted(seeds)  # an interrupted study has whole seeds
    assert min(seeds) >= 21  # those below were looked at while the settings were chosen


@pytest.mark.parametrize("name", STUDIES)
def test_planned_tests_are_of_runs_that_are_made(name: StudyName) -> None:
    study = plan_of(name)
    seeds: dict[tuple[str, str | None], set[int]] = {}
    for config in study.configs:
        seeds.setdefault((config.setting, config.arm), set()).add(config.seed)
    for test in study.tests:
        assert test.a != test.b
        assert len(seeds[test.a] & seeds[test.b]) >= 5
    assert len(set(study.tests)) == len(study.tests)


@pytest.mark.parametrize("name", STUDIES)
def test_arms_of_a_setting_are_compared_on_equal_terms(name: StudyName) -> None:
    """Within a setting the prompts, the tokens and the number of updates are the same."""
    by_setting: dict[str, set[tuple[object, ...]]] = {}
    for config in plan_of(name).configs:
        if "before" in f"{config.arm}" or "after" in f"{config.arm}":
            continue  # restarts make the steps that are left
        terms = (config.task, config.steps, config.updates_per_rollout, config.learning_rate)
        sizes = (config.prompts_per_rollout, config.group_size, config.model.num_layers)
        by_setting.setdefault(config.setting, set()).add(terms + sizes)
    assert {len(terms) for terms in by_setting.values()} == {1}


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_runs_any_arm_wherever_it_runs_grpo(name: StudyName) -> None:
    """An arm of its own as it has it, another as GRPO's run with what the arm changes."""
    study = plan_of(name)
    grpo = {(c.setting, c.seed): c for c in study.configs if c.arm == "grpo"}
    if not grpo:
        return
    some = study.with_arms(["grpo", "sapo", "grpo"])
    assert [c for c in some.configs if c.arm == "grpo"] == list(grpo.values())
    theirs = {(c.setting, c.seed): c for c in some.configs if c.arm == "sapo"}
    assert theirs.keys() >= grpo.keys() or "sapo" in {c.arm for c in study.configs}
    for place in theirs.keys() & grpo.keys():
        change = {"algorithm": "sapo", "arm": "sapo"}
        assert theirs[place] == grpo[place].replace(**change)
    with pytest.raises(ConfigError, match="no such arm"):
        study.with_arms(["gropo"])


def test_remedies_run_every_arm_and_eight_seeds_of_the_main_ones() -> None:
    study = plan_of("remedies")
    for setting in ("routing-noise", "stale", "small-updates", "mild-stale"):
        arms = arms_of(study, setting)
        without = {"grpo+mean-old", "tis", "mis", "geo-rs", "icepop"} if setting == "stale" else ()
        assert set(arms) == set(ARMS).difference(without)
        main = {arm for arm, seeds in arms.items() if seeds == 8}
        assert main >= {"grpo", "grpo+dual-clip", "grpo+rollout-old", "grpo+replay", "gspo"}
        assert set(arms.values()) == {5, 8}
    for config in study.configs:
        if config.setting.endswith("-dense"):
            assert config.model.num_experts == config.model.experts_per_token
            assert config.router_noise == 0 and config.routing_replay == "disabled"


def test_placement_changes_the_age_of_the_data_and_nothing_else() -> None:
    settings = {c.setting: c for c in plan_of("placement").configs if "updates-" in c.setting}
    for config in settings.values():
        per_update = config.prompts_per_rollout // config.updates_per_rollout
        assert (per_update, config.steps * config.updates_per_rollout) == (4, 160)
        assert math.isclose(config.warmup_steps * config.updates_per_rollout, 40)


def test_restarts_start_where_the_original_saved_its_policy() -> None:
    study = plan_of("irreversibility")
    originals = {run_folder(ROOT, c): c for c in study.configs if c.arm == "grpo"}
    restarts = [c for c in study.configs if c.arm != "grpo"]
    assert len(restarts) == 12 * len(originals)
    for config in restarts:
        folder, step = _checkpoint(config)
        original = originals[folder]
        assert original.seed == config.seed and original.save_every
        assert step % original.save_every == 0 or step == original.steps


def _checkpoint(config: RunConfig) -> tuple[Path, int]:
    assert config.model.checkpoint is not None
    path = Path(config.model.checkpoint)
    return path.parent, int(path.name.removeprefix("policy_"))


def test_the_command_line_knows_every_study() -> None:
    folder = Path(__file__).parents[2] / "experiments" / "studies"
    files = {file.stem for file in folder.glob("*.py")} - {"__init__"}
    assert files == set(get_args(StudyName))


def test_a_study_of_no_run_is_refused() -> None:
    with pytest.raises(ConfigError, match="no run is left: give at least one arm and one seed"):
        quick(seeds=[])


def test_machines_can_share_a_study_by_its_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    def listed(*words: str) -> list[str]:
        assert main(["study", "tolerance", "--dry-run", *words]) == 0
        return capsys.readouterr().out.splitlines()[:-1]

    parts = [listed("--seeds", "24", "25"), listed("--seeds", "21", "22", "23")]
    assert all(parts) and sorted(parts[0] + parts[1]) == sorted(listed())
    assert main(["study", "tolerance", "--dry-run", "--seeds", "24", "99"]) == 2
    assert "seeds=99: the study has 21, 22, 23, 24, 25" in capsys.readouterr().err
