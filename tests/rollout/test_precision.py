"""Rollouts with rounded weights: the rounding itself, which weights it takes, and what stays."""

import copy
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_policy import ALPHABET, PROMPTS, small_policy, widen
from torch import Tensor

from moe_rl.batch import RolloutBatch, response_positions
from moe_rl.config import ConfigError, Family, RunConfig
from moe_rl.cpu import FastPath
from moe_rl.metrics.instruments import mismatch_metrics
from moe_rl.policy.build import build_policy
from moe_rl.policy.forward import ForwardOptions, response_pass
from moe_rl.policy.policy import Policy
from moe_rl.policy.tokenizer import tokenizer_of
from moe_rl.presets import preset
from moe_rl.replay_check.families import build_family
from moe_rl.rollout.engine import make_engine
from moe_rl.rollout.precision import find_weights, round_weight, rounded_weights
from moe_rl.rollout.request import Request
from moe_rl.run_folder.log import NoLog
from moe_rl.tasks import task_of
from moe_rl.training.run import train
from moe_rl.training.trainer import Trainer

LOW: list[Any] = ["bf16", "fp8", "int8", "int4"]
SCALED: list[Any] = ["fp8", "int8", "int4"]
FAMILIES: list[Family] = ["qwen3_moe", "olmoe", "mixtral", "deepseek_v3", "gpt_oss"]


def request(group_size: int = 3, **changes: Any) -> Request:
    return Request(
        prompts=PROMPTS,
        numbers=range(4),
        seed=7,
        purpose="sample",
        group_size=group_size,
        max_tokens=6,
        **changes,
    )


def family_policy(family: Family, *, fuse: bool = True) -> Policy:
    model = dataclasses.replace(preset("tiny").model, family=family)
    return widen(build_policy(model, ALPHABET, seed=3, fuse=fuse))


def channels(*shape: int) -> Tensor:
    """Weights whose channels, rows of the last axis, differ in size by up to 10^4."""
    rng = torch.Generator().manual_seed(5)
    weight = torch.randn(shape, generator=rng)
    return weight * torch.logspace(-3, 1, shape[-2])[:, None]


# The rounding of one weight.


def grid(precision: str) -> np.ndarray:
    """All values of the format in steps of a scale, from its definition."""
    if precision != "fp8":
        largest = {"int8": 127, "int4": 7}[precision]
        return np.arange(-largest, largest + 1, dtype=np.float64)
    # e4m3: 4 bits of exponent with bias 7, 3 of mantissa; the code of all ones is NaN.
    codes = [(e, m) for e in range(16) for m in range(8) if (e, m) != (15, 7)]
    positive = [m / 8 * 2**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e, m in codes]
    return np.array(sorted({*positive, *(-value for value in positive)}))


@pytest.mark.parametrize("precision", SCALED)
def test_each_weight_becomes_the_nearest_value_of_its_channels_grid(precision: Any) -> None:
    weight = channels(5, 40)
    rounded = round_weight(weight, precision)
    for row, got in zip(weight.double().numpy(), rounded.double().numpy(), strict=True):
        values = grid(precision) * np.abs(row).max() / grid(precision).max()
        nearest = np.abs(row[:, None] - values).min(1)
        tiny = np.abs(row).max() * 1e-7  # the result is a float32
        assert np.all(np.abs(got[:, None] - values).min(1) <= tiny), "not on the grid"
        assert np.all(np.abs(got - row) <= nearest + tiny)


def test_errors_are_within_half_a_step() -> None:
    weight = channels(6, 200).double()
    size = weight.abs()
    top = size.amax(1, keepdim=True)
    bounds = {
        "int8": top / 127 / 2,
        "int4": top / 7 / 2,
        # A step is an eighth of the power of two below, and no less than 2^-9 of the scale.
        "fp8": (size / 16).maximum(top / 448 * 2**-10),
        "bf16": size / 256,
    }
    for precision in LOW:
        error = (round_weight(weight, precision) - weight).abs()
        assert (error <= bounds[precision] * (1 + 1e-9)).all(), precision
        assert (error > bounds[precision] / 4).any(), f"{precision}: rounds finer than it says"


def test_bf16_keeps_the_upper_half_of_the_bits_to_nearest_even() -> None:
    weight = channels(4, 64)
    bits = weight.numpy().view(np.uint32)
    expected = ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
    assert np.array_equal(round_weight(weight, "bf16").numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("precision", LOW)
def test_rounding_twice_is_rounding_once(precision: Any, dtype: torch.dtype) -> None:
    weight = channels(3, 16, 33).to(dtype)
    once = round_weight(weight, precision)
    assert not torch.equal(once, weight) and once.dtype == dtype
    assert torch.equal(round_weight(once, precision), once)


@pytest.mark.parametrize("precision", SCALED)
def test_channels_are_rounded_apart(precision: Any) -> None:
    """Each as if it were alone: of a matrix, of a stack of experts, and of transposed experts."""
    experts = channels(4, 6, 20)
    rounded = round_weight(experts, precision)
    for expert, got in zip(experts, rounded, strict=True):
        assert torch.equal(round_weight(expert, precision), got)
        for row, one in zip(expert, got, strict=True):
            assert torch.equal(round_weight(row[None], precision)[0], one)
    turned = round_weight(experts.transpose(1, 2), precision, input_axis=-2)
    assert torch.equal(turned.transpose(1, 2), rounded)


@pytest.mark.parametrize("precision", LOW)
def test_a_channel_of_zeros_stays_zero_and_nan_is_not_hidden(precision: Any) -> None:
    weight = torch.zeros(2, 4)
    weight[1, 2] = float("nan")
    rounded = round_weight(weight, precision)
    assert (rounded[0] == 0).all() and rounded[1].isnan().any()


# Which weights.

ATTENTION = {f"self_attn.{name}_proj.weight" for name in "qkvo"}
LATENT = {f"self_attn.{name}.weight" for name in ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj")}
EXPERTS = {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
SHARED = {f"mlp.shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")}
TAKEN: dict[str, set[str]] = dict.fromkeys(FAMILIES, ATTENTION | EXPERTS)
TAKEN["deepseek_v3"] = LATENT | {"self_attn.o_proj.weight"} | EXPERTS | SHARED


@pytest.mark.parametrize("family", FAMILIES)
def test_linear_layers_of_attention_and_experts_are_taken_and_nothing_else(family: Family) -> None:
    model = family_policy(family).model
    before = {name: p.clone() for name, p in model.named_parameters()}
    with rounded_weights(model, "int4"):
        changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        inside = {name: p.clone() for name, p in model.named_parameters()}
    layers = range(model.config.num_hidden_layers)
    assert changed == {f"model.layers.{i}.{name}" for i in layers for name in TAKEN[family]}
    for name in changed:
        # GPT-OSS multiplies by [E, in, out], all others by [(E,) out, in].
        turned = family == "gpt_oss" and "experts" in name
        rows = (inside[name].mT if turned else inside[name]).flatten(0, -2)
        assert max(len(row.unique()) for row in rows) <= 15, name


def test_bf16_takes_every_parameter() -> None:
    model = small_policy().model
    with rounded_weights(model, "bf16"):
        assert all(torch.equal(p, p.bfloat16().float()) for p in model.parameters())


@pytest.mark.parametrize("family", ["llama4_text", "dbrx", "jetmoe"])
def test_experts_whose_axes_are_unknown_are_refused(family: str) -> None:
    model = build_family(family)
    with pytest.raises(ConfigError, match=r"rollout_precision=int8: .* unrounded; use bf16"):
        find_weights(model, "int8")
    assert find_weights(model, "bf16")


def test_a_gate_of_a_shared_expert_stays_as_it_is() -> None:
    model = build_family("qwen2_moe")
    taken = {id(parameter) for parameter, _ in find_weights(model, "fp8")}
    gates = [p for name, p in model.named_parameters() if "shared_expert_gate" in name]
    assert gates and not any(id(gate) in taken for gate in gates)


def test_a_checkpoint_that_cannot_be_rounded_leaves_no_run_behind(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    build_family("jetmoe").save_pretrained(folder)
    tokenizer_of(ALPHABET).save_pretrained(folder)
    config = preset("tiny").replace(
        checkpoint=str(folder), experts_implementation="eager", rollout_precision="int8"
    )
    with pytest.raises(ConfigError, match="rollout_precision=int8: JetMoe"):
        train(config, tmp_path / "run", cold_start_cache=tmp_path / "cold")
    assert not (tmp_path / "run").exists()


# The engine.


def rounded_copy(policy: Policy, precision: Any) -> Policy:
    """A policy that has the rounded weights for its own and stock layers."""
    model = copy.deepcopy(policy.model)
    FastPath(model).remove()
    with torch.no_grad():
        for parameter, axis in find_weights(model, precision):
            parameter.copy_(round_weight(parameter, precision, input_axis=axis))
    return dataclasses.replace(policy, model=model)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["bf16", "int4"])
def test_the_engine_samples_as_a_policy_of_the_rounded_weights(
    precision: Any, family: Family
) -> None:
    """On the fused layers too, before and after a rollout of the policy's own weights."""
    policy = family_policy(family)
    plain = make_engine("cached", policy)
    first = plain.sample(request())
    batch = make_engine("cached", policy, precision).sample(request())
    assert not torch.equal(batch.rollout_logprobs, first.rollout_logprobs)
    assert_same(plain.sample(request()), first)
    with torch.no_grad():
        expected = response_pass(
            rounded_copy(policy, precision), batch, ForwardOptions(), layout="whole"
        )
    mask = batch.response_mask
    found = batch.rollout_logprobs[mask]
    assert torch.allclose(found, expected.logprobs[mask], rtol=0, atol=1e-4)
    assert expected.routed_experts is not None and batch.routed_experts is not None
    width = batch.prompt_ids.shape[1]
    ours, theirs = (
        response_positions(routes, width)[mask].sort(-1).values
        for routes in (batch.routed_experts, expected.routed_experts)
    )
    assert torch.equal(ours, theirs)


def assert_same(ours: RolloutBatch, theirs: RolloutBatch) -> None:
    for field in dataclasses.fields(RolloutBatch):
        a, b = getattr(ours, field.name), getattr(theirs, field.name)
        assert (a is None and b is None) or torch.equal(a, b), field.name


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("fails", [False, True])
def test_the_policy_is_bitwise_untouched_also_after_an_error(
    fails: bool, precision: Any, policy: Policy
) -> None:
    parameters = list(policy.model.parameters())
    before = [(p.data_ptr(), p.clone(), p.requires_grad) for p in parameters]
    engine = make_engine("cached", policy, precision)
    if fails:
        head = policy.model.get_output_embeddings()
        hook = head.register_forward_hook(lambda *args: args[-1] * float("nan"))
        with pytest.raises(FloatingPointError, match="NaN or inf"):
            engine.sample(request())
        hook.remove()
    else:
        engine.sample(request())
    assert all(a is b for a, b in zip(policy.model.parameters(), parameters, strict=True))
    for parameter, (place, value, trained) in zip(parameters, before, strict=True):
        assert parameter.data_ptr() == place and torch.equal(parameter, value)
        assert parameter.requires_grad == trained


def test_engine_and_trainer_differ_the_more_the_coarser_the_weights(policy: Policy) -> None:
    found: dict[str, Any] = {}
    for precision in ("float32", "bf16", "int8", "fp8", "int4"):
        batch = make_engine("cached", policy, precision).sample(request(group_size=256))
        with torch.no_grad():
            old = response_pass(policy, batch, ForwardOptions())
        found[precision] = mismatch_metrics(batch, old)
    assert found["float32"]["mismatch/router_disagreement"] == 0.0
    assert abs(found["float32"]["mismatch/kl_k3"]) < 1e-10
    for name in ("mismatch/router_disagreement", "mismatch/kl_k3"):
        rising = [
            found[precision][name] for precision in ("float32", "bf16", "int8", "fp8", "int4")
        ]
        assert all(2 * a < b for a, b in itertools.pairwise(rising)), (name, rising)


# A run.


def trainer(cold: Path, **changes: Any) -> Trainer:
    config = tiny(**changes)
    task = task_of(config.task)
    policy = widen(build_policy(config.model, task.alphabet, seed=3))
    return Trainer(config, policy, task, NoLog(cold))


def tiny(**changes: Any) -> RunConfig:
    small = {"prompts_per_rollout": 8, "group_size": 16, "sft_steps": 0, "digits": 4}
    return preset("tiny").replace(**small | changes).named()


def test_r3_replays_the_choices_made_with_rounded_weights(tmp_path: Path) -> None:
    """Which takes from the mismatch what routing has in it."""
    live, _ = trainer(tmp_path, rollout_precision="fp8").experience(0)
    made = trainer(tmp_path, rollout_precision="fp8", routing_replay="R3")
    replayed, _ = made.experience(0)
    assert_same(live.batch, replayed.batch)
    assert torch.equal(replayed.replay, replayed.batch.routed_experts)
    assert not torch.equal(replayed.replay, live.old_routes)

    def distance(experience: Any) -> float:
        gap = experience.old_logprobs - experience.batch.rollout_logprobs
        return gap[experience.batch.response_mask].square().mean().item()

    assert 0 < distance(replayed) < distance(live) / 2


def test_old_log_probs_of_the_engine_are_those_of_the_rounded_weights(tmp_path: Path) -> None:
    made = trainer(tmp_path, rollout_precision="int4", old_logprobs="rollout")
    experience, _ = made.experience(0)
    copied = rounded_copy(made.policy, "int4")
    with torch.no_grad():
        expected = response_pass(copied, experience.batch, ForwardOptions(), layout="whole")
    mask = experience.batch.response_mask
    assert torch.allclose(experience.old_logprobs[mask], expected.logprobs[mask], atol=1e-4)


def test_the_summary_says_which_numbers_the_rollouts_had(tmp_path: Path) -> None:
    said = {}
    for precision in ("float32", "int4"):
        config = tiny(steps=1, rollout_precision=precision)
        train(config, tmp_path / precision, cold_start_cache=tmp_path)
        said[precision] = json.loads((tmp_path / precision / "summary.json").read_text())
    assert said["float32"]["rollout_numerics"] == "weights and arithmetic float32"
    assert said["int4"]["rollout_numerics"] == "weights rounded to int4, arithmetic float32"
