"""What the integration logs: equal to the instruments on the whole batch of an update."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_trl import Spy, alone, build, logged, own_engine, tiny_model, whole

from moe_rl.integrations.trl_metrics import routing_means, routing_sums
from moe_rl.metrics.branches import branch_shares
from moe_rl.metrics.ratios import ratio_statistics, split_log_ratio
from moe_rl.routing import statistics

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "integrations.md"
OURS = ("routing/", "ratio/", "rollout_ratio/", "branch/", "mismatch/", "kl_k3")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def ours(line: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in line.items() if name.startswith(OURS)}


def joined(parts: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs, old log-probs and mask of the micro-batches of an update, padded to one width."""
    columns = zip(
        *(
            (s["logprobs"], s["inputs"]["old_per_token_logps"], s["inputs"]["completion_mask"])
            for s in parts
        ),
        strict=True,
    )
    width = max(s["logprobs"].shape[1] for s in parts)
    rows = [
        torch.cat([torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in column])
        for column in columns
    ]
    return rows[0], rows[1], rows[2].bool()


def test_micro_batches_are_measured_as_one_batch(tmp_path: Path) -> None:
    """Two of two rollouts make an update: they differ in padding, and in variance."""
    settings = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "steps_per_generation": 2,
        "num_iterations": 3,
        "max_steps": 3,
    }
    trainer = build(tmp_path, kind=Spy, args=settings, routing_replay="R2")
    trainer.train()
    lines = logged(trainer)
    assert len(lines) == 3 and len(trainer.seen) == 12
    for index, line in enumerate(lines):
        parts = trainer.seen[4 * index : 4 * index + 4]
        expected = ratio_statistics(*joined(parts))
        for name, value in expected.items():
            if name != "kl":
                assert line[name] == pytest.approx(value, rel=1e-4, abs=1e-7), name
        by_part = [ratio_statistics(*joined([part]))["ratio/token_log_var"] for part in parts]
        if index:
            assert abs(line["ratio/token_log_var"] - sum(by_part) / 4) > 1e-6
    assert "kl" not in lines[0]  # TRL's name for the reference model, and beta is 0


def test_the_live_choice_is_compared_where_response_tokens_are_predicted(tmp_path: Path) -> None:
    trainer = build(tmp_path, kind=Spy, args={"max_steps": 2})  # live, so `used` is the live choice
    trainer.train()
    seen = trainer.seen[1]
    inputs = seen["inputs"]
    churn = []
    for row in range(8):
        _, places, prompt = whole(inputs, row)
        old, new = (
            routes[row, places][prompt - 1 : -1]
            for routes in (inputs["live_routed_experts"], seen["used"])
        )
        churn.append(statistics.churn(old, new))
    every = torch.cat(churn)
    line = logged(trainer)[1]
    assert every.mean() > 0.05
    assert line["routing/churn"] == pytest.approx(every.mean().item(), abs=1e-6)
    differ = (every > 0).float()
    assert line["routing/router_disagreement"] == pytest.approx(differ.mean().item(), abs=1e-6)
    tokens = differ.amax(-1).mean().item()
    assert line["routing/token_disagreement"] == pytest.approx(tokens, abs=1e-6)


def gradient_by_hand(seen: dict[str, Any], loss_type: str) -> torch.Tensor:
    """|dL/dlogprob| up to a factor that is one for the whole update, from the published losses."""
    inputs = seen["inputs"]
    mask, advantages = inputs["completion_mask"].double(), inputs["advantages"][:, None].double()
    lengths = mask.sum(1, keepdim=True)
    log_ratio = (seen["logprobs"] - inputs["old_per_token_logps"]).double() * mask
    if loss_type == "gspo":
        log_ratio = (log_ratio.sum(1, keepdim=True) / lengths).expand_as(mask)
    ratio = log_ratio.exp()
    clipped = ((advantages > 0) & (ratio > 1.2)) | ((advantages < 0) & (ratio < 0.8))
    weight = {"dapo": 1.0, "dr_grpo": 1.0, "bnpo": 1 / mask.sum()}.get(loss_type, 1 / lengths)
    return (ratio * advantages * weight * mask).abs().masked_fill(clipped, 0.0)


def branches_by_hand(parts: list[dict[str, Any]], loss_type: str) -> dict[str, float]:
    """Of the parts of an update, whose losses are on one scale and whose widths differ."""
    columns = []
    for seen in parts:
        inputs, width = seen["inputs"], seen["logprobs"].shape[1]
        mask = inputs["completion_mask"].bool()
        flipped = torch.zeros_like(mask)
        if "used" in seen:
            before, now = (
                routes[:, -width - 1 : -1].sort(-1).values
                for routes in (inputs["live_routed_experts"], seen["used"])
            )
            flipped = (before != now).any(-1).any(-1)
        column = (
            gradient_by_hand(seen, loss_type),
            (seen["logprobs"] - inputs["old_per_token_logps"]).double(),
            inputs["advantages"][:, None].double().expand(-1, width),
            mask,
            flipped,
        )
        columns += zip(*column, strict=True)
    tokens = [torch.cat(tensors)[None] for tensors in zip(*columns, strict=True)]
    return branch_shares(*tokens)


@pytest.mark.parametrize(
    ("loss_type", "changes"),
    [
        ("grpo", {}),
        ("dapo", {"loss_type": "dapo"}),
        ("bnpo", {"loss_type": "bnpo"}),
        ("dr_grpo", {"loss_type": "dr_grpo", "bf16": True}),
        ("gspo", {"importance_sampling_level": "sequence"}),
    ],
)
def test_branch_shares_are_those_of_the_gradient_that_the_loss_has(
    tmp_path: Path, loss_type: str, changes: dict[str, Any]
) -> None:
    settings = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 2,
        "max_steps": 2,
    }
    trainer = build(tmp_path, kind=Spy, args=settings | changes)
    trainer.train()
    line = logged(trainer)[1]
    expected = branches_by_hand(trainer.seen[2:], loss_type)
    assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-3, abs=1e-6)
    flipped = sum(value for name, value in expected.items() if name.endswith("_flipped"))
    assert 0.0 < flipped < 1.0 and sum(value > 0.0 for value in expected.values()) >= 7
    assert "rollout_ratio/mean" not in line, "TRL's own generation gives no log-probs"


def test_the_ratio_to_the_engine_that_sampled_is_logged_where_it_gives_log_probs(
    tmp_path: Path,
) -> None:
    def other_engine(prompts: list[str], trainer: Any) -> dict[str, Any]:
        out = own_engine(prompts, trainer)
        return {**out, "logprobs": [[x - 1.0 for x in row] for row in out["logprobs"]]}

    trainer = build(tmp_path, args={"max_steps": 2}, rollout_func=other_engine)
    trainer.train()
    first = logged(trainer)[0]
    assert first["ratio/mean"] == pytest.approx(1.0, abs=1e-5)
    assert first["rollout_ratio/mean"] == pytest.approx(math.e, rel=1e-4)
    assert (first["rollout_ratio/survival_2"], first["rollout_ratio/survival_10"]) == (1.0, 0.0)


def split_by_hand(seen: dict[str, Any], record: str) -> dict[str, float]:
    """The split from forwards of single samples on the weights of the update."""
    model = tiny_model().eval()
    model.load_state_dict(seen["weights"])
    inputs = seen["inputs"]
    mask = inputs["completion_mask"].bool()
    live, replayed = (torch.zeros_like(seen["logprobs"]) for _ in range(2))
    for row in range(len(mask)):
        tokens, places, prompt = whole(inputs, row)
        routes = inputs[record][row, places][None]
        live[row, mask[row]] = alone(model, tokens, prompt, None)[0]
        replayed[row, mask[row]] = alone(model, tokens, prompt, routes)[0]
    return split_log_ratio(live, replayed, inputs["old_per_token_logps"], mask)


@pytest.mark.parametrize(
    ("mode", "record"), [("disabled", "live_routed_experts"), ("R2", "routed_experts")]
)
def test_the_split_is_that_of_forwards_by_hand(tmp_path: Path, mode: Any, record: str) -> None:
    trainer = build(tmp_path, kind=Spy, routing_replay=mode, attribution_every=2)
    trainer.train()
    lines = logged(trainer)
    assert ["ratio/routing_part" in line for line in lines] == [False, True, False, True]
    for index in (1, 3):
        expected = split_by_hand(trainer.seen[index], record)
        for name, value in expected.items():
            assert lines[index][name] == pytest.approx(value, rel=1e-3, abs=1e-6), name
        assert expected["ratio/routing_part"] > 1e-4


def test_under_replay_the_ratio_of_the_loss_has_no_routing_part(tmp_path: Path) -> None:
    replayed, live = (
        build(tmp_path, routing_replay=mode, attribution_every=1) for mode in ("R2", "disabled")
    )
    for trainer in (replayed, live):
        trainer.train()
    for line in (logged(replayed)[i] for i in (1, 3)):
        assert line["ratio/token_log_var"] == pytest.approx(line["ratio/weight_part"], rel=1e-6)
        assert line["ratio/routing_part"] > 1e-4  # what a live forward would have put in
    for line in (logged(live)[i] for i in (1, 3)):
        parts = line["ratio/routing_part"] + line["ratio/weight_part"]
        whole_variance = parts + 2 * line["ratio/part_covariance"]
        assert line["ratio/token_log_var"] == pytest.approx(whole_variance, rel=1e-6)
        assert line["ratio/token_log_var"] != pytest.approx(line["ratio/weight_part"], rel=1e-2)


def test_where_trl_makes_no_pass_of_an_old_policy_there_is_nothing_to_compare(
    tmp_path: Path,
) -> None:
    trainer = build(tmp_path, args={"num_iterations": 1, "max_steps": 1})
    trainer.train()
    assert not ours(logged(trainer)[0])


def test_tokens_of_tools_do_not_count(tmp_path: Path) -> None:
    """`env_mask` of a rollout_func, 0 at tokens that the policy has not made."""

    def engine(prompts: list[str], trainer: Any) -> dict[str, Any]:
        out = own_engine(prompts, trainer)
        return {**out, "env_mask": [[1] + [0] * (len(c) - 1) for c in out["completion_ids"]]}

    trainer = build(tmp_path, kind=Spy, args={"max_steps": 2}, rollout_func=engine)
    trainer.train()
    seen, line = trainer.seen[1], logged(trainer)[1]
    first = torch.zeros_like(seen["logprobs"], dtype=torch.bool)
    first[:, 0] = True
    old = seen["inputs"]["old_per_token_logps"]
    expected = ratio_statistics(seen["logprobs"], old, first)["ratio/token_log_var"]
    assert line["ratio/token_log_var"] == pytest.approx(expected, rel=1e-4)


def test_sums_of_parts_give_the_means_of_the_whole() -> None:
    draws = torch.Generator().manual_seed(0)
    old, new = (
        torch.rand(6, 5, 3, 8, generator=draws).topk(2, -1).indices.short() for _ in range(2)
    )
    new[0, :, 1] = -1  # a layer without a record
    mask = torch.rand(6, 5, generator=draws) > 0.4
    churn = statistics.churn(old, new, mask)
    parts = [routing_sums(churn[rows]) for rows in (slice(2), slice(2, 6))]
    means = routing_means(sum(parts), "routing")
    assert means == {
        "routing/churn": pytest.approx(statistics.per_layer(churn).mean().item()),
        "routing/router_disagreement": pytest.approx(
            statistics.per_layer(statistics.router_disagreement(churn)).mean().item()
        ),
        "routing/token_disagreement": pytest.approx(
            statistics.token_disagreement(churn).nanmean().item()
        ),
    }
    nothing = routing_means(routing_sums(torch.full_like(churn, math.nan)), "routing")
    assert all(math.isnan(value) for value in nothing.values())


def table_names(title: str) -> set[str]:
    text = GUIDE.read_text().split(f"### {title}")[1].split("\n## ")[0].split("\n### ")[0]
    rows = re.findall(r"^\| (`[^|]+) \|", text, flags=re.M)
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def test_the_guide_lists_what_is_logged(tmp_path: Path) -> None:
    options = {"routing_replay": "R3", "rollout_func": own_engine, "attribution_every": 1}
    trainer = build(tmp_path, args={"max_steps": 2}, **options)
    trainer.train()
    off = {"routing_diagnostics": False, "rollout_func": own_engine}
    plain = build(tmp_path, args={"max_steps": 2}, **off)
    plain.train()
    added = set(logged(trainer)[0]) - set(logged(plain)[0])
    assert added == table_names("What is logged")


@pytest.mark.slow
def test_the_example_of_the_guide_runs(tmp_path: Path) -> None:
    example = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), flags=re.M | re.S)[0]
    assert "RoutingReplayGRPOTrainer" in example and len(example.splitlines()) <= 32
    done = run(["-c", example], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "routing/churn" in done.stdout and "ratio/routing_part" in done.stdout


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True
    )


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["R2", "R3"])
def test_two_processes_log_the_metrics_of_the_global_batch(tmp_path: Path, mode: str) -> None:
    script = Path(__file__).with_name("two_processes.py")
    # `--cpu` starts one process, whatever the number; use_cpu of the arguments keeps it off GPUs.
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1"
    options = "--mixed_precision no --dynamo_backend no --main_process_port 0"
    words = f"{launch} {options} {script} {tmp_path} {mode}"
    done = run(words.split(), tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert [rank["processes"] for rank in ranks] == [2, 2]
    assert ranks[0]["weights"] == ranks[1]["weights"]
    assert ranks[0]["tokens"] != ranks[1]["tokens"]
    assert all(rank["followed"] for rank in ranks)
    for update in range(2):
        lines = [ours(rank["lines"][update]) for rank in ranks]
        assert lines[0] == lines[1] and len(lines[0]) > 15
        parts = [tensors(rank["seen"][update]) for rank in ranks]
        expected = ratio_statistics(*joined(parts))
        for name in ("ratio/token_log_var", "ratio/sequence_var", "ratio/token_log_max"):
            assert lines[0][name] == pytest.approx(expected[name], rel=1e-4, abs=1e-7)
        for name, value in branches_by_hand(parts, "grpo").items():
            if not name.endswith("_flipped"):
                assert lines[0][name] == pytest.approx(value, rel=1e-3, abs=1e-6), name
    assert ours(ranks[0]["lines"][1])["routing/churn"] > 0


def tensors(seen: dict[str, Any]) -> dict[str, Any]:
    values = {name: torch.tensor(value) for name, value in seen.items()}
    return {"logprobs": values.pop("logprobs"), "inputs": values}
