"""Several ranks train as one does: gradients, metrics, checkpoints, failures."""

import contextlib
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_same_run
from runtime import ranks as processes
from runtime import workers
from safetensors.torch import load_file

from moe_rl.config import ConfigError
from moe_rl.policy.folder import as_loaded
from moe_rl.replay_check.families import build_family
from moe_rl.runtime.ranks import Ranks
from moe_rl.runtime.wrapped import check_can_be_sharded
from moe_rl.training.run import train
from moe_rl.training.share import Share


@pytest.mark.parametrize(("prompts", "updates"), [(32, 8), (6, 2), (4, 4), (9, 3), (5, 1)])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_shares_cover_every_update_evenly(prompts: int, updates: int, size: int) -> None:
    config = workers.tiny(prompts_per_rollout=prompts, updates_per_rollout=updates)
    shares = [Share(config, rank, size) for rank in range(size)]
    joined = [prompt for share in shares for prompt in share.prompts]
    assert [joined[place] for place in shares[0].order()] == list(range(prompts))
    each = prompts // updates
    for update in range(updates):
        parts = [share.prompts[share.of_update(update)] for share in shares]
        assert sorted(p for part in parts for p in part) == [
            *range(update * each, (update + 1) * each)
        ]
        assert max(map(len, parts)) == shares[0].most_of_update(update)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for share in shares:  # what a rank holds of the updates is its whole batch, in order
        ends = [share.of_update(update) for update in range(updates)]
        assert ends[0].start == 0 and ends[-1].stop == len(share.prompts)
        assert all(a.stop == b.start for a, b in itertools.pairwise(ends))


def test_more_ranks_than_prompts_are_refused() -> None:
    config = workers.tiny(prompts_per_rollout=2, updates_per_rollout=2)
    with pytest.raises(ConfigError, match="prompts_per_rollout=2 on 3 processes"):
        Share(config, 0, 3)


@pytest.mark.distributed
def test_what_ranks_tell_each_other(tmp_path: Path) -> None:
    processes.run_worker("exchange", 2, tmp_path)


_DIES = """
import os, sys
from pathlib import Path
mark = Path(sys.argv[2], os.environ["RANK"])
deaths = int(sys.argv[3]) if os.environ["RANK"] == "1" else 0
mark.write_text(mark.read_text() + "x" if mark.exists() else "x")
if len(mark.read_text()) <= deaths:
    os.abort()
"""


@pytest.mark.parametrize(("deaths", "starts"), [(0, 1), (1, 2), (2, 2)])
def test_ranks_that_die_in_native_code_are_started_once_more(
    deaths: int, starts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(_DIES)
    monkeypatch.setattr(processes, "WORKERS", worker)
    told = pytest.warns(UserWarning, match="Fatal Python error: Aborted")
    with told if deaths else contextlib.nullcontext():
        if deaths > 1:
            with pytest.raises(AssertionError, match="Aborted"):
                processes.run_worker("dies", 2, tmp_path, str(deaths))
        else:
            processes.run_worker("dies", 2, tmp_path, str(deaths))
    assert (tmp_path / "1").read_text() == "x" * starts


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gradients")
    processes.run_worker("gradients", 1, folder, "ddp")
    for name in workers.VARIANTS:
        (folder / f"{name}.ddp.0.json").rename(folder / f"{name}.alone.json")
        (folder / f"{name}.ddp.safetensors").rename(folder / f"{name}.alone.safetensors")
    return folder


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(("size", "parallelism"), [(2, "ddp"), (2, "fsdp"), (3, "ddp")])
def test_ranks_give_the_gradients_and_metrics_of_one(
    size: int, parallelism: str, alone: Path
) -> None:
    processes.run_worker("gradients", size, alone, parallelism)
    for name in workers.VARIANTS:
        ours = load_file(alone / f"{name}.{parallelism}.safetensors")
        theirs = load_file(alone / f"{name}.alone.safetensors")
        assert ours.keys() == theirs.keys(), name
        assert any(gradient.abs().max() > 1e-4 for gradient in theirs.values()), name
        for key, gradient in theirs.items():
            scale = gradient.abs().max().item()
            assert torch.allclose(ours[key], gradient, rtol=0, atol=1e-7 + 2e-4 * scale), (
                name,
                key,
            )
        ranks = [
            json.loads((alone / f"{name}.{parallelism}.{rank}.json").read_text())
            for rank in range(size)
        ]
        assert all(rank == ranks[0] for rank in ranks), name
        expected = json.loads((alone / f"{name}.alone.json").read_text())
        assert_close(ranks[0][:2], expected[:2], name)


def assert_close(ours: Any, theirs: Any, where: str) -> None:
    """The rollout's metrics and the first update's; later ones stand behind a step."""
    for line, expected in zip(ours, theirs, strict=True):
        assert line.keys() == expected.keys()
        for key, value in expected.items():
            pairs = (
                zip(line[key], value, strict=True)
                if isinstance(value, list)
                else [(line[key], value)]
            )
            for a, b in pairs:
                same = math.isclose(a, b, rel_tol=2e-3, abs_tol=1e-6)
                assert same or a == b or (math.isnan(a) and math.isnan(b)), (where, key, a, b)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("parallelism", ["ddp", "fsdp"])
def test_two_ranks_killed_and_resumed_are_bitwise_the_same(
    parallelism: str, tmp_path: Path
) -> None:
    processes.run_worker("die_again_and_again", 2, tmp_path, parallelism)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.distributed
@pytest.mark.slow
def test_a_checkpoint_of_two_ranks_opens_on_one(tmp_path: Path) -> None:
    """And the run then ends where one rank alone would have, up to rounding."""
    processes.run_worker("die_in_the_middle", 2, tmp_path)
    cold = tmp_path / "cold"
    train(workers.moving(2), tmp_path / "run", cold_start_cache=cold, resume=True)
    train(workers.moving(2), tmp_path / "alone", cold_start_cache=cold)
    weights = [
        load_file(tmp_path / run / "policy_00002" / "model.safetensors") for run in ("run", "alone")
    ]
    moved = load_file(next(cold.glob("*/model.safetensors")))
    for name, weight in weights[1].items():
        # Of the whole tensor: AdamW turns the sign of a gradient that is 0 but for rounding into a
        # whole step of that one weight.
        step = (weight - moved[name]).norm().item()
        assert (weights[0][name] - weight).norm().item() <= 0.05 * step + 1e-7, name
    config = json.loads((tmp_path / "run" / "policy_00002" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3MoeForCausalLM"]


@pytest.mark.distributed
def test_nan_on_one_rank_stops_both_before_the_step(tmp_path: Path) -> None:
    processes.run_worker("nan_on_one_rank", 2, tmp_path)
    said = [(tmp_path / f"said{rank}").read_text() for rank in range(2)]
    assert said[0] == said[1]
    assert "rollout step 1, update 1: the loss or its gradient is NaN or inf" in said[0]
    assert (tmp_path / "run" / "crash" / "00001-01" / "crash.json").is_file()
    last = json.loads((tmp_path / "run" / "updates.jsonl").read_text().splitlines()[-1])
    assert last["skipped"] == 1 and last["grad_norm"] == "NaN"


@pytest.mark.distributed
def test_families_train_on_two_ranks_as_on_one(tmp_path: Path) -> None:
    """Parameters outside the loss, and float32 masters of sharded bfloat16 weights."""
    processes.run_worker("families", 2, tmp_path)
    workers.families(Ranks(), tmp_path)
    for family, near in (("deepseek_v32", 2e-4), ("deepseek_v3", 0.1)):
        ours, theirs = (load_file(tmp_path / f"{family}.{n}.safetensors") for n in (2, 1))
        assert ours.keys() == theirs.keys()
        lines = json.loads((tmp_path / f"{family}.2.json").read_text())
        assert all(line["weights/moved_share"] > 0.5 for line in lines[1:])
        for key, gradient in theirs.items():
            assert (ours[key] - gradient).norm() <= near * gradient.norm() + 1e-6, key
    indexers = [key for key in load_file(tmp_path / "deepseek_v32" / "model.safetensors")
                if "indexer" in key]  # fmt: skip
    trained = load_file(tmp_path / "deepseek_v32.2.safetensors")
    assert indexers and not any(name in key for name in indexers for key in trained)


def test_parameters_of_two_types_are_not_sharded() -> None:
    model: Any = build_family("ernie4_5_moe")
    check_can_be_sharded(model)
    with pytest.raises(ConfigError, match=r"parallelism='fsdp': .* in torch\.float32.*; use ddp"):
        check_can_be_sharded(as_loaded(model, torch.bfloat16))
