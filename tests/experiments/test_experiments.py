"""Studies: what they run, and what they refuse before anything runs."""

import json
from pathlib import Path

import pytest

from moe_rl.analysis.verdicts.verdicts import MIN_SEEDS
from moe_rl.commands.reproduce import Reproduce
from moe_rl.config import ConfigError
from moe_rl.experiments import collapse_map
from moe_rl.experiments.arms import ARMS, MAIN_ARMS, TWIST_ARM, arm_config, find_arm
from moe_rl.experiments.bench.training import useful_operations
from moe_rl.experiments.executors.local import LocalExecutor
from moe_rl.experiments.quick import quick, twice_as_many
from moe_rl.experiments.runner import check_study, run_all, run_folder
from moe_rl.experiments.study import FIVE_SEEDS, StudyPlan
from moe_rl.presets import preset
from moe_rl.tasks import make_task


def small_map(**changes: object) -> StudyPlan:
    axes = {
        "learning_rates": (2e-4,),
        "updates": (4,),
        "noises": (0.0,),
        "arms": ("grpo",),
        "seeds": (1,),
    }
    return collapse_map.grid(base=preset("tiny"), **(axes | changes))  # type: ignore[arg-type]


def test_arms_differ_in_how_they_learn_alone() -> None:
    """Arms of a setting see the same prompts, make the same steps and draw the same noise."""
    base = preset("routing-noise")
    own = {"arm", "seed", "on_nonfinite", "algorithm", "routing_replay", "old_logprobs"}
    for name in ARMS:
        config = arm_config(name, base, replay="R3", seed=3)
        ours, theirs = config.to_dict(), base.to_dict()
        changed = {key for key in ours if ours[key] != theirs[key]}
        assert changed <= own | {"old_passes", "freeze_router"} | {"model"} & {
            "model" if name.startswith("dense") else ""
        } | ({"router_noise"} if name.startswith("dense") else set())
        assert config.on_nonfinite == "skip", "a study keeps its worst runs"
        assert (config.arm, config.seed) == (name, 3)


def test_the_dense_control_has_the_active_size_of_the_moe() -> None:
    base = preset("mild-stale")
    dense = arm_config("dense", base, replay="R2", seed=1)
    assert dense.model.num_experts == dense.model.experts_per_token == base.model.experts_per_token
    assert dense.model.expert_size == base.model.expert_size


def test_close_learning_rates_have_folders_of_their_own(tmp_path: Path) -> None:
    configs = small_map(learning_rates=(2e-4, 2.4e-4)).configs
    assert len({run_folder(tmp_path, config) for config in configs}) == 2


def test_a_value_named_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="seed 1 is asked for twice: both runs would share"):
        check_study(small_map(seeds=(1, 1)).configs, tmp_path, jobs=1)


def test_another_study_in_the_folder_is_refused_and_kept(tmp_path: Path) -> None:
    small_map().write(tmp_path / "map", "moe-rl map")
    before = (tmp_path / "map" / "study.json").read_bytes()
    small_map().write(tmp_path / "map", "moe-rl map")
    with pytest.raises(ConfigError, match=r"seeds=\[1\], this one has \[2\]"):
        small_map(seeds=(2,)).write(tmp_path / "map", "moe-rl map")
    with pytest.raises(ConfigError, match="holds a study"):
        quick().write(tmp_path / "map", "moe-rl reproduce")
    assert (tmp_path / "map" / "study.json").read_bytes() == before


def test_a_study_that_has_grown_goes_on_in_its_folder(tmp_path: Path) -> None:
    small_map().write(tmp_path / "map", "moe-rl map")
    small_map(seeds=(1, 2)).write(tmp_path / "map", "moe-rl map")
    assert json.loads((tmp_path / "map" / "study.json").read_text())["seeds"] == [1, 2]
    with pytest.raises(ConfigError, match=r"seeds=\[1, 2\], this one has \[1\]; give another"):
        small_map().write(tmp_path / "map", "moe-rl map")


def test_what_a_variant_adds_is_a_question_to_the_arm_that_it_is_added_to() -> None:
    assert find_arm("gspo+rollout-old").compare_with == ("gspo",)
    assert find_arm("grpo+rollout-old+R3").compare_with == ("grpo+rollout-old",)
    assert find_arm("own.py:mine").compare_with == find_arm("before-same").compare_with == ("grpo",)


def test_a_folder_that_is_no_study_is_refused(tmp_path: Path) -> None:
    (tmp_path / "chapter1.tex").write_text("precious")
    with pytest.raises(ConfigError, match="no study"):
        small_map().write(tmp_path, "moe-rl map")


def test_the_quick_study_is_the_main_arms_on_enough_seeds_for_a_verdict() -> None:
    runs = [(c.arm, c.seed) for c in quick(seeds=Reproduce().seeds).configs]
    twist = (TWIST_ARM, FIVE_SEEDS[0])
    assert sorted(runs) == sorted([twist, *((a, s) for s in FIVE_SEEDS for a in MAIN_ARMS)])
    assert len(FIVE_SEEDS) >= MIN_SEEDS


def test_more_seeds_are_as_many_that_were_not_asked_for() -> None:
    assert twice_as_many(FIVE_SEEDS) == (*FIVE_SEEDS, 26, 27, 28, 29, 30)
    assert twice_as_many((9, 4)) == (9, 4, 10, 11)


def test_named_arms_run_with_every_seed() -> None:
    configs = quick(arms=("grpo", TWIST_ARM), seeds=(1, 2)).configs
    assert [(c.arm, c.seed) for c in configs] == [
        (arm, seed) for seed in (1, 2) for arm in ("grpo", TWIST_ARM)
    ]


def test_the_quick_study_of_families_has_a_setting_for_each() -> None:
    configs = quick(families=("olmoe", "gpt_oss"), seeds=(1,)).configs
    assert {(c.setting, c.model.family) for c in configs} == {
        ("olmoe", "olmoe"),
        ("gpt_oss", "gpt_oss"),
    }


def test_useful_operations_are_those_of_a_dense_count() -> None:
    config = preset("tiny")
    task = make_task("running_sum", digits=config.task.digits)
    work = useful_operations(config, task)
    # By hand: 8 prompts of 3 tokens, 64 responses of 3 of which 2 are read again.
    tokens = 8 * 3 + 64 * 2
    weights = 2 * (4 * 32 * 32 + 8 * 32 + 3 * 2 * 32 * 16)
    seen = 8 * (1 + 2 + 3) + 64 * (4 + 5)
    head = 2 * 32 * 13 * 64 * 3
    assert work.rollout == 2 * weights * tokens + 4 * 32 * 2 * seen + head
    assert work.total == 5 * work.rollout


def test_a_run_waits_for_the_checkpoint_it_starts_from(tmp_path: Path) -> None:
    """The restart is first in line, and starts once the other run has saved its policy."""
    base = preset("tiny").replace(sft_steps=1, steps=1, save_every=1, arm="grpo")
    saved = run_folder(tmp_path, base) / "policy_00001"
    restarted = base.replace(arm="again", checkpoint=str(saved), save_every=0, sft_steps=0)
    cache = tmp_path / "cold"
    assert run_all([restarted, base], tmp_path, jobs=2, executor=LocalExecutor(cache)) == []
    never = restarted.replace(checkpoint=str(tmp_path / "never"), seed=2)
    (failure,) = run_all([never], tmp_path, jobs=1, executor=LocalExecutor(cache))
    assert "never saved" in failure.reason


def test_a_map_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="no router to perturb"):
        small_map(arms=("dense",), noises=(0.1,))
