"""Held-out evaluation: what pass@k estimates, which problems it takes, and a run that logs it."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_policy import small_policy

from moe_rl.config import ConfigError, RunConfig, TaskConfig
from moe_rl.presets import preset
from moe_rl.run_folder.sealing import read_sealed
from moe_rl.runtime.ranks import Ranks
from moe_rl.tasks import Dataset, Task, make_task, task_of
from moe_rl.training import evaluation
from moe_rl.training.cold_start import saved_policy
from moe_rl.training.crash import NonFinite
from moe_rl.training.evaluation import evaluate_policy, held_out_problems, pass_at_k
from moe_rl.training.run import resolve, train

PUBLISHED = Path(__file__).parents[1] / "tasks" / "published"


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample() -> None:
    for samples, k in ((1, 1), (5, 1), (5, 3), (6, 6)):
        for right in range(samples + 1):
            subsets = [*itertools.combinations(range(samples), k)]
            share = sum(min(s) < right for s in subsets) / len(subsets)
            assert pass_at_k(samples, right, k) == pytest.approx(share)


def held_out(folder: Path, count: int) -> Dataset:
    for name in ("train", "test"):
        rows = [{"prompt": f"{name} {i}", "answer": "0"} for i in range(count)]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Dataset(dataset=str(folder / "train"), evaluation_dataset=str(folder / "test"))


def test_held_out_rows_are_all_taken_or_drawn_without_repeats(tmp_path: Path) -> None:
    task = held_out(tmp_path, 40)
    taken = {count: [str(p.prompt) for p in held_out_problems(task, count)] for count in (10, 99)}
    assert taken[99] == [f"test {i}" for i in range(40)]
    assert len({*taken[10]}) == 10 and {*taken[10]} < {*taken[99]}
    assert taken[10] == [str(p.prompt) for p in held_out_problems(task, 10)]
    assert {str(p.prompt)[:4] for p in task.prompts(np.random.default_rng(0), 50)} == {"trai"}
    drawn = make_task("running_sum", digits=2)
    assert len(held_out_problems(drawn, 7)) == 7


class OneOf(Ranks):
    """A rank that is told nothing: its totals are its own share."""

    def total(self, value: float) -> float:
        return value

    def largest(self, value: int) -> int:
        return value


def test_chunks_and_ranks_change_no_metric() -> None:
    policy, task = small_policy(), make_task("running_sum", digits=1)
    config = preset("tiny").replace(evaluation_prompts=13, evaluation_samples=8, evaluation_k=3)
    whole = evaluate_policy(policy, task, config, 0, Ranks())
    assert 0 < whole["pass_at_1"] < whole["pass_at_k"] < 1
    assert whole["pass_at_1"] == pytest.approx(whole["evaluation_reward"])
    small = config.replace(prompts_per_rollout=8, group_size=2)
    chunked = evaluate_policy(policy, task, small, 0, Ranks())
    ranks = [OneOf(rank=rank, size=3) for rank in range(3)]
    shares = [evaluate_policy(policy, task, config, 0, rank) for rank in ranks]
    for name, value in whole.items():
        assert chunked[name] == pytest.approx(value)
        assert sum(share[name] for share in shares) == pytest.approx(value)


def test_gsm8k_trains_end_to_end_and_aime_is_evaluated_by_32_samples(tmp_path: Path) -> None:
    """What is logged is what the saved policy of that step scores."""
    pytest.importorskip("math_verify", reason="pip install 'moe-rl[math]'")
    task = TaskConfig(
        task="dataset",
        dataset=str(PUBLISHED / "gsm8k.jsonl"),
        judge="math_verify",
        response_tokens=6,
        evaluation_dataset=str(PUBLISHED / "aime.jsonl"),
    )
    small = {"sft_steps": 0, "prompts_per_rollout": 4, "group_size": 16}
    every = {"evaluate_every": 2, "save_every": 2, "steps": 3, "evaluation_samples": 32}
    config = resolve(preset("tiny").replace(task=task, **small | every))
    assert config.task.dataset_sha256 != config.task.evaluation_sha256
    train(config, tmp_path / "run", cold_start_cache=tmp_path / "cold")
    steps = [json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").open()]
    assert ["pass_at_1" in step for step in steps] == [False, True, False]
    updates = [json.loads(line) for line in (tmp_path / "run" / "updates.jsonl").open()]
    assert max(step["reward"] for step in steps) > 0 < max(u["grad_norm"] for u in updates)
    policy = saved_policy(config, dataset_of(config), tmp_path / "run" / "policy_00002")
    found = evaluate_policy(policy, dataset_of(config), config, 1, Ranks())
    assert {name: steps[1][name] for name in found} == found
    assert 0 < found["pass_at_1"] < found["pass_at_k"]


def dataset_of(config: RunConfig) -> Task:
    return task_of(config.task)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"evaluate_every": 1, "evaluation_samples": 4},
            "evaluation_k=8 with evaluation_samples=4",
        ),
        (
            {"task": TaskConfig(task="dataset", dataset="x", evaluation_dataset="y")},
            "evaluation_dataset='y' with evaluate_every=0: it would never be read",
        ),
    ],
)
def test_evaluations_that_cannot_be_made_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        preset("tiny").replace(**changes)


def test_nan_in_an_evaluation_leaves_a_crash_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nan(*args: object, **draws: object) -> None:
        raise FloatingPointError("the policy's logits are NaN")

    monkeypatch.setattr(evaluation, "sample_rewards", nan)
    config = preset("tiny").replace(evaluate_every=1, steps=1, sft_steps=2)
    with pytest.raises(NonFinite, match="update 4: held-out evaluation: the policy's logits"):
        train(config, tmp_path / "run", cold_start_cache=tmp_path / "cold")
    assert read_sealed(tmp_path / "run" / "crash" / "00000-04") is not None
