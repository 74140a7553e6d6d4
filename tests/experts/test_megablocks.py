"""Megablocks experts: the package's own kernels against transformers' eager experts."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from moe_rl.experts import choose_experts, megablocks_package
from moe_rl.experts.megablocks import grouped_product
from moe_rl.replay_check.families import build_family

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the CPU: Triton's interpreter
ROUTES = ["megablocks", "megablocks_sparse"]
WIDE = {"hidden_size": 128, "moe_intermediate_size": 128, "num_hidden_layers": 1}


def build(family: str = "qwen3_moe", **changes: Any) -> Any:
    model: Any = build_family(family, **changes)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.3)
    return model.to(DEVICE)


def tokens(batch: int = 2, length: int = 6) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.randint(2, 60, (batch, length), generator=rng).to(DEVICE)


def run(model: Any, backend: str, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.set_experts_implementation(backend)
    model.zero_grad()
    out = model(ids)
    out = out.logits if "logits" in out else out.last_hidden_state
    out.float().square().mean().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return out.detach(), grads


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / (expected.norm() + 1e-30))


def require_equal(model: Any, route: str, ids: Tensor) -> None:
    expected, expected_grads = run(model, "eager", ids)
    logits, grads = run(model, route, ids)
    assert relative(logits, expected) <= 1e-5
    assert grads.keys() == expected_grads.keys()
    for name, gradient in grads.items():
        assert relative(gradient, expected_grads[name]) <= 1e-5, name


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "mixtral"])
def test_logits_and_gradients_are_those_of_eager(route, family) -> None:
    changes = WIDE | ({"intermediate_size": 128} if family == "mixtral" else {})
    require_equal(build(family, **changes), route, tokens())


@pytest.mark.parametrize(
    "family",
    [
        "gpt_oss",  # transposed, interleaved, biased, a gate of its own
        "aria_text",  # transposed
        "nemotron_h",  # no gate
        "muse_spark_text",  # a norm behind the experts
        "minimax_m3_vl_text",  # a gate of its own
        "olmoe",
    ],
)
def test_the_grouped_route_runs_every_layout(family) -> None:
    require_equal(build(family), "megablocks", tokens())


def test_a_transposed_layout_runs_on_the_sparse_route_too() -> None:
    require_equal(
        build("aria_text", hidden_size=128, intermediate_size=128), "megablocks_sparse", tokens()
    )


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("gpt_oss", "GptOssExperts, which have biases"),
        ("nemotron_h", "which have no gate"),
        ("minimax_m3_vl_text", "which have a gate of their own"),
        ("muse_spark_text", "which have a norm behind them"),
        ("olmoe", r"multiples of 128; OlmoeExperts has hidden 32 and expert width 32"),
    ],
)
def test_the_sparse_route_refuses_other_experts_by_name(family, words) -> None:
    model = build(family)
    model.set_experts_implementation("megablocks_sparse")
    with pytest.raises(ValueError, match=words):
        model(tokens())


@pytest.mark.parametrize("route", ROUTES)
def test_an_expert_without_tokens_gets_exactly_zero_gradient(route) -> None:
    experts = build(**WIDE).model.layers[0].mlp.experts
    experts.config._experts_implementation = route
    hidden = torch.randn(5, 128, device=DEVICE, requires_grad=True)
    index = torch.tensor([[0, 5]], device=DEVICE).repeat(5, 1)
    experts(hidden, index, torch.full((5, 2), 0.5, device=DEVICE)).sum().backward()
    for name in ("gate_up_proj", "down_proj"):
        norms = getattr(experts, name).grad.flatten(1).norm(dim=1)
        assert (norms[[1, 2, 3, 4, 6, 7]] == 0).all() and (norms[[0, 5]] > 0).all(), name


@pytest.mark.parametrize("route", ROUTES)
def test_no_tokens_give_no_rows(route) -> None:
    experts = build(**WIDE).model.layers[0].mlp.experts
    experts.config._experts_implementation = route
    hidden = torch.zeros(0, 128, device=DEVICE)
    index = torch.zeros(0, 2, dtype=torch.long, device=DEVICE)
    assert experts(hidden, index, hidden[:, :2]).shape == (0, 128)


def test_more_than_255_column_blocks_do_not_overflow() -> None:
    """130 experts of 2 blocks: with 16-bit ids, block 256 would begin at element -32768."""
    model = build(num_experts=130, num_experts_per_tok=2, **WIDE)
    experts = model.model.layers[0].mlp.experts
    index = torch.tensor([[0, 129], [128, 129], [127, 1]], device=DEVICE)
    hidden = torch.randn(3, 128, device=DEVICE)
    weights = torch.rand(3, 2, device=DEVICE)
    results = {}
    for name in ("eager", "megablocks_sparse"):
        experts.config._experts_implementation = name
        experts.zero_grad()
        out = experts(hidden, index, weights)
        out.square().sum().backward()
        results[name] = (out.detach(), experts.gate_up_proj.grad.clone())
    for got, expected in zip(results["megablocks_sparse"], results["eager"], strict=True):
        assert relative(got, expected) <= 1e-5


@pytest.mark.parametrize("route", ROUTES)
def test_what_would_write_out_of_bounds_is_refused(route) -> None:
    experts = build(**WIDE).cpu().model.layers[0].mlp.experts
    experts.config._experts_implementation = route
    hidden, weights = torch.randn(2, 128), torch.rand(2, 2)
    with pytest.raises(ValueError, match=r"ids from 0 to 8, but the layer has 8 experts"):
        experts(hidden, torch.tensor([[0, 8], [1, 2]]), weights)
    huge = torch.zeros(1, 2, dtype=torch.long).expand(2**23, 2)
    with pytest.raises(ValueError, match="beyond the 2147483648 that Megablocks' kernels"):
        experts(torch.zeros(1, 128).expand(2**23, 128), huge, weights)
    experts._is_expert_parallel = True
    with pytest.raises(ValueError, match="expert-parallel"):
        experts(hidden, torch.tensor([[0, 7], [1, 2]]), weights)


@pytest.mark.skipif(torch.cuda.is_available(), reason="bfloat16 runs on a GPU")
def test_bfloat16_in_the_interpreter_is_refused() -> None:
    model = build(**WIDE).to(torch.bfloat16)
    model.set_experts_implementation("megablocks")
    with pytest.raises(ValueError, match="multiplies bfloat16 as raw integers"):
        model(tokens())


@pytest.mark.gpu
@pytest.mark.parametrize("route", ROUTES)
def test_bfloat16_is_as_close_to_float32_as_eager(route) -> None:
    model = build(hidden_size=256, moe_intermediate_size=128)
    exact, _ = run(model, "eager", tokens(4, 64))
    half = model.to(torch.bfloat16)
    eager, _ = run(half, "eager", tokens(4, 64))
    got, grads = run(half, route, tokens(4, 64))
    assert relative(got.float(), exact) <= 2 * relative(eager.float(), exact)
    assert all(bool(g.isfinite().all()) for g in grads.values())


@pytest.mark.parametrize("columns", [8, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_grouped_product_is_a_loop_over_experts(columns, dtype) -> None:
    """Sizes and types that torch's own product takes, and others; an expert without rows."""
    rows, matrices = torch.randn(7, 8, dtype=dtype), torch.randn(4, 8, columns, dtype=dtype)
    got = grouped_product(rows, matrices, torch.tensor([3, 3, 6, 7], dtype=torch.int32))
    parts = [rows[:3] @ matrices[0], rows[3:6] @ matrices[2], rows[6:] @ matrices[3]]
    torch.testing.assert_close(got, torch.cat(parts))


def test_the_stand_in_is_used_unless_the_extension_is_there() -> None:
    ops = megablocks_package.load().ops
    assert "torch stand-in" in megablocks_package.extension()
    x = torch.tensor([2, 0, 2, 1], dtype=torch.int32)
    values, order = ops.sort(x, 2)
    assert values.tolist() == [0, 1, 2, 2] and order.tolist() == [1, 3, 0, 2]
    assert ops.histogram(x, 4).tolist() == [1, 1, 2, 0]
    assert ops.inclusive_cumsum(x, 0).view(-1).tolist() == [2, 2, 4, 5]
    assert ops.exclusive_cumsum(x, 0).view(-1).tolist() == [0, 2, 2, 4]
    bins = torch.tensor([256, 256, 384], dtype=torch.int32)
    assert ops.topology(bins, 128, 3, 2).tolist() == [0, 1, 0, 1, 4, 5]
    ends = torch.tensor([1, 1, 3], dtype=torch.int32)
    per_expert = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
    spread = ops.replicate(per_expert, ends, 3)
    assert spread.tolist() == [[1, 3, 3]]


def test_the_choice_says_what_is_missing(monkeypatch: Any) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_experts("cpu", "megablocks").name == "megablocks"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="start with TRITON_INTERPRET=1"):
        choose_experts("cpu", "megablocks_sparse")
    assert choose_experts("cuda", "auto").name == "megablocks"
    monkeypatch.setattr(megablocks_package.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="run `make megablocks`"):
        choose_experts("cuda", "megablocks")
    choice = choose_experts("cuda", "auto")
    assert choice.name == "grouped_mm" and "make megablocks" in choice.reason


def losses_of_training(backend: str, folder: Path) -> list[float]:
    # Small in everything: the interpreter takes seconds for what a kernel does in microseconds.
    command = ["train", "--preset", "tiny", "--steps", "2", "--num-layers", "1", "--out", backend]
    command += ["--group-size", "2", "--prompts-per-rollout", "1", "--updates-per-rollout", "1"]
    command += ["--sft-steps", "1", "--sft-batch-size", "2", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "moe_rl", *command, "--experts", backend],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (folder / backend / "updates.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.slow
def test_training_runs_on_megablocks_in_the_interpreter(tmp_path: Path) -> None:
    """The losses are those of transformers' own backend, up to rounding."""
    ours = losses_of_training("megablocks", tmp_path)
    theirs = losses_of_training("grouped_mm", tmp_path)
    assert len(ours) == 2
    assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


def test_a_loaded_checkpoint_runs_the_same(tmp_path: Path) -> None:
    model = build(**WIDE)
    model.save_pretrained(tmp_path)
    loaded: Any = (
        AutoModelForCausalLM.from_pretrained(
            tmp_path, experts_implementation="megablocks", attn_implementation="eager"
        )
        .to(DEVICE)
        .eval()
    )
    plain = copy.deepcopy(model)
    plain.set_experts_implementation("eager")
    with torch.no_grad():
        assert relative(loaded(tokens()).logits, plain(tokens()).logits) <= 1e-5
