"""The rollout engine `vllm` against our own forward: equal in float32, near in bf16."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_policy import ALPHABET, PROMPTS, widen
from torch import Tensor
from transformers import GptOssConfig

from moe_rl.batch import RolloutBatch, response_positions
from moe_rl.config import ConfigError
from moe_rl.policy.build import build_policy
from moe_rl.policy.forward import ForwardOptions, response_pass
from moe_rl.policy.policy import Policy
from moe_rl.presets import preset
from moe_rl.rollout import vllm_outputs
from moe_rl.rollout.engine import check_engine, make_engine
from moe_rl.rollout.precision import RoundedEngine, rounded_weights
from moe_rl.rollout.request import Request
from moe_rl.rollout.vllm import VllmEngine
from moe_rl.routing.statistics import churn, router_disagreement

GROUP, TOKENS = 3, 6


def wide_policy(family: str = "qwen3_moe") -> Policy:
    """8 experts, top-2, one head of 32."""
    sizes = {"num_attention_heads": 1, "expert_size": 32}
    return widen(
        build_policy(preset("tiny").replace(family=family, **sizes).model, ALPHABET, seed=3)
    )


@pytest.fixture(scope="module")
def shared() -> Iterator[VllmEngine]:
    engine = make_engine("vllm", wide_policy())
    assert isinstance(engine, VllmEngine)
    yield engine


@pytest.fixture
def engine(shared: VllmEngine) -> Iterator[VllmEngine]:
    """In float32; its weights are those of before, whatever a test did to them."""
    own = [parameter.data.clone() for parameter in shared.policy.model.parameters()]
    yield shared
    for parameter, data in zip(shared.policy.model.parameters(), own, strict=True):
        parameter.data.copy_(data)


@pytest.fixture(scope="module")
def half() -> Iterator[VllmEngine]:
    """In bf16, of a trainer in float32."""
    engine = make_engine("vllm", wide_policy(), "bf16")
    assert isinstance(engine, VllmEngine)
    yield engine


def request(step: int = 0, numbers: range = range(4)) -> Request:
    return Request(
        prompts=[PROMPTS[number % 4] for number in numbers],
        numbers=numbers,
        seed=7,
        purpose="sample",
        step=step,
        group_size=GROUP,
        max_tokens=TOKENS,
    )


def trainer_pass(policy: Policy, batch: RolloutBatch, replay: Tensor | None = None) -> Tensor:
    """Log-probs of the response tokens [N]."""
    with torch.no_grad():
        return response_pass(policy, batch, ForwardOptions(replay=replay)).logprobs[
            batch.response_mask
        ]


def differing_routers(policy: Policy, batch: RolloutBatch) -> float:
    with torch.no_grad():
        ours = response_pass(policy, batch, ForwardOptions()).routed_experts
    width = batch.prompt_ids.shape[1]
    assert ours is not None and batch.routed_experts is not None
    routes = [response_positions(routes, width) for routes in (ours, batch.routed_experts)]
    changed = churn(routes[0], routes[1], batch.response_mask)
    return router_disagreement(changed).nanmean().item()


def assert_equal(policy: Policy, batch: RolloutBatch) -> None:
    difference = trainer_pass(policy, batch) - batch.rollout_logprobs[batch.response_mask]
    assert difference.abs().max() < 1e-4
    assert differing_routers(policy, batch) == 0


def test_log_probs_and_routes_in_float32_are_those_of_our_own_forward(engine: VllmEngine) -> None:
    batch = engine.sample(request())
    assert_equal(engine.policy, batch)
    assert (~batch.response_mask).any() and (~batch.prompt_mask).any(), "uneven lengths"


@pytest.mark.parametrize(
    "part", ["experts.gate_up", "experts.down", "gate.weight", "q_proj", "lm_head", "embed", "norm"]
)
def test_every_kind_of_weight_follows_the_trainer(part: str, engine: VllmEngine) -> None:
    before = engine.sample(request())
    for name, parameter in engine.policy.model.named_parameters():
        if part in name:
            parameter.data.mul_(1.2)
    after = engine.sample(request())
    assert_equal(engine.policy, after)
    assert not torch.equal(trainer_pass(engine.policy, before), before.rollout_logprobs)


@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
def test_other_families_are_equal_too_before_and_after_an_update(family: str) -> None:
    engine = make_engine("vllm", wide_policy(family))
    assert isinstance(engine, VllmEngine)
    for _ in range(2):
        assert_equal(engine.policy, engine.sample(request()))
        for parameter in engine.policy.model.parameters():
            parameter.data.mul_(1.1)


def test_gpt_oss_is_read_as_long_as_its_weights_stay() -> None:
    policy = wide_policy("gpt_oss")
    model = policy.model
    with pytest.raises(ConfigError, match="sinks are in bfloat16 alone"):
        check_engine("vllm", model, "float32", trained=False)
    with pytest.raises(ConfigError, match="rope_parameters without a factor"):
        check_engine("vllm", model, "bf16", trained=False)
    model.config.rope_parameters = GptOssConfig().rope_parameters  # as the family is published
    policy = widen(replace(policy, model=type(model)(model.config)))
    check_engine("vllm", policy.model, "bf16", trained=False)
    batch = make_engine("vllm", policy, "bf16").sample(request())
    ours = trainer_pass(policy, batch, batch.routed_experts)
    assert (ours - batch.rollout_logprobs[batch.response_mask]).abs().mean() < 0.03
    assert differing_routers(policy, batch) < 0.1


@pytest.mark.parametrize("keeps", ["everything", "experts"])
def test_a_reload_that_leaves_weights_behind_stops_the_run_before_any_update(
    keeps: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update at 1e-6 moves log-probs by less than rounding does: waiting for it is too late."""
    name = "RepackExperts.reload_and_repack" if keeps == "everything" else "forget_packed_experts"
    monkeypatch.setattr(f"moe_rl.rollout.vllm_worker.{name}", lambda kept: None)
    engine = make_engine("vllm", wide_policy())
    words = r"layer 1 is a copy of layer 0|step 0: its log-probs are .* where float32 explains"
    with pytest.raises(ValueError, match=words):
        engine.sample(request())


def test_experts_that_a_reload_leaves_behind_stop_the_run(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.sample(request())
    monkeypatch.setattr(engine, "_reload", "reload_weights")  # without dropping packed experts
    for name, parameter in engine.policy.model.named_parameters():
        if "experts" in name:
            parameter.data.mul_(1.2)
    with pytest.raises(ValueError, match=r"step 3: its log-probs are .* where float32 explains"):
        engine.sample(request(step=3))


def test_routes_of_another_pass_stop_the_run(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = vllm_outputs.read_outputs

    def read_others(*args: object, **options: object) -> RolloutBatch:
        batch: RolloutBatch = read(*args, **options)
        assert batch.routed_experts is not None
        recorded = batch.routed_experts >= 0
        batch.routed_experts[recorded] = (batch.routed_experts[recorded] + 1) % 8
        return batch

    monkeypatch.setattr("moe_rl.rollout.vllm.read_outputs", read_others)
    with pytest.raises(ValueError, match="routes are not those of its pass"):
        engine.sample(request())


def test_what_a_prompt_samples_is_decided_by_its_address_alone(engine: VllmEngine) -> None:
    whole, part = engine.sample(request()), engine.sample(request(numbers=range(2, 4)))
    length = part.response_ids.shape[1]
    assert torch.equal(whole.response_ids[2 * GROUP :, :length], part.response_ids)
    assert not torch.equal(whole.response_ids, engine.sample(request(step=1)).response_ids)


def test_more_prompt_tokens_than_one_step_reads(engine: VllmEngine) -> None:
    """vLLM reads 4096 prompt tokens a step; on a CPU seeded requests fail if it cuts a prompt."""
    many = Request(
        prompts=["1234567890=" * 8] * 64,
        numbers=range(64),
        seed=7,
        purpose="sample",
        group_size=2,
        max_tokens=TOKENS,
    )
    assert_equal(engine.policy, engine.sample(many))


def test_every_token_that_ends_a_response_ends_it(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = (engine.policy.eos_id, 5)
    monkeypatch.setitem(vars(engine.policy), "end_ids", ends)  # of a checkpoint with two
    batch = engine.sample(request(numbers=range(8)))
    is_end = torch.isin(batch.response_ids, torch.tensor(ends)) & batch.response_mask
    assert (batch.response_ids[is_end] == 5).any()
    assert torch.equal(is_end.any(1), ~batch.truncated)
    assert (is_end.sum(1) <= 1).all()


def test_rounded_weights_are_handed_over(engine: VllmEngine) -> None:
    policy = engine.policy
    batch = RoundedEngine(engine, policy.model, "int4").sample(request())
    with rounded_weights(policy.model, "int4"):
        assert_equal(policy, batch)
    assert differing_routers(policy, batch) > 0.01


def test_an_engine_leaves_the_trainers_threads_to_the_trainer(engine: VllmEngine) -> None:
    engine.sample(request())
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)  # vLLM's worker puts a function that does nothing there
    assert torch.get_num_threads() == threads + 1
    torch.set_num_threads(threads)


def test_the_copies_of_the_weights_do_not_pile_up(engine: VllmEngine) -> None:
    for step in range(2):
        engine.sample(request(step))
    assert len(list(Path(engine._folder.name).rglob("*.safetensors"))) == 1


def test_bf16_is_as_far_from_float32_as_its_rounding_and_replay_removes_most_of_it(
    half: VllmEngine,
) -> None:
    for _ in range(2):  # before and after an update
        batch = half.sample(request(numbers=range(64)))
        engine = batch.rollout_logprobs[batch.response_mask]
        live, replayed = (
            trainer_pass(half.policy, batch, replay) - engine
            for replay in (None, batch.routed_experts)
        )
        assert 0 < differing_routers(half.policy, batch) < 0.1
        assert 1e-3 < replayed.abs().mean() < 0.05
        k3 = [(step.exp() - 1 - step).mean().item() for step in (live, replayed)]
        assert k3[1] < 0.3 * k3[0] < 0.1
        for parameter in half.policy.model.parameters():
            parameter.data.mul_(1.05)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "num_attention_heads=2 makes heads 16 wide, and its kernels take 32, 64"),
        ({"hidden_size": 80, "num_attention_heads": 1}, "hidden_size=80 is no multiple of 32"),
        ({"family": "deepseek_v3"}, r"kv_lora_rank \+ qk_rope_head_dim = 576, not 16 \+ 4"),
        ({"family": "gpt_oss"}, "type gpt_oss: vLLM 0.30 keeps its first experts"),
    ],
)
def test_a_model_without_cpu_kernels_is_refused_before_the_run(
    changes: dict[str, object], words: str
) -> None:
    policy = build_policy(preset("tiny").replace(**changes).model, ALPHABET)
    with pytest.raises(ConfigError, match=words):
        check_engine("vllm", policy.model, "float32")
