"""vLLM as the rollout engine: its contract, on a stand-in that speaks its fields."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_policy import PROMPTS
from vllm_stand_in import Behaviour, Logprob, install

from moe_rl.batch import RolloutBatch
from moe_rl.commands.cli import main
from moe_rl.config import ConfigError, RunConfig, load_config
from moe_rl.policy.policy import Policy
from moe_rl.presets import preset
from moe_rl.rollout.cached import CachedEngine
from moe_rl.rollout.engine import make_engine
from moe_rl.rollout.request import Request
from moe_rl.rollout.vllm import VllmEngine
from moe_rl.run_folder.log import RunLog
from moe_rl.runtime.seeding import request_seed, uniforms
from moe_rl.training.run import train

STEPS, GROUP, TOKENS = 2, 3, 6


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Behaviour:
    return install(monkeypatch)


@pytest.fixture(scope="module")
def cold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cold")


def tiny(**changes: Any) -> RunConfig:
    small = {"steps": STEPS, "prompts_per_rollout": 4, "group_size": 4, "learning_rate": 2e-3}
    return preset("tiny").replace(**small | changes)


def request(step: int = 0, numbers: range = range(4), **changes: Any) -> Request:
    prompts = [PROMPTS[number % 4] for number in numbers]
    return Request(
        prompts=prompts,
        numbers=numbers,
        seed=7,
        purpose="sample",
        step=step,
        group_size=GROUP,
        max_tokens=TOKENS,
        **changes,
    )


def draw_as_cached(vllm: Behaviour, seed: int) -> None:
    """Let the stand-in draw, for each request, what the cached engine draws at its address."""
    address = {
        request_seed(seed, "sample", step=step, prompt=prompt): (step, prompt)
        for step in range(STEPS)
        for prompt in range(8)
    }

    def draws(request: int, n: int, count: int) -> np.ndarray:
        step, prompt = address[request]
        return uniforms(seed, "sample", step=step, prompts=[prompt], group_size=n, count=count)

    vllm.draws = draws


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{k: v for k, v in line.items() if "seconds" not in k} for line in found]


def run(config: RunConfig, folder: Path, cold: Path) -> list[list[dict[str, Any]]]:
    train(config, folder, cold_start_cache=cold)
    return [lines(folder, name) for name in ("steps.jsonl", "updates.jsonl")]


def assert_same_rollout(ours: RolloutBatch, theirs: RolloutBatch) -> None:
    """Equal in all that counts: what stands at padding is nobody's."""
    for name in ("prompt_ids", "prompt_mask", "response_ids", "response_mask", "truncated"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    mask = ours.response_mask
    assert torch.equal(ours.rollout_logprobs[mask], theirs.rollout_logprobs[mask])
    recorded = (ours.routed_experts >= 0).all(-1)
    assert torch.equal(ours.routed_experts[recorded], theirs.routed_experts[recorded])
    width = ours.prompt_ids.shape[1]
    assert recorded[:, width - 1 : -1][mask].all(), "no record where a response token is predicted"


# Laws.


@pytest.mark.parametrize("replay", ["disabled", "R2", "R3"])
def test_training_with_vllm_is_training_with_the_cached_engine_where_both_draw_the_same(
    replay: str, vllm: Behaviour, tmp_path: Path, cold: Path
) -> None:
    config = tiny(routing_replay=replay)
    draw_as_cached(vllm, config.seed)
    ours = run(config.replace(engine="vllm"), tmp_path / "vllm", cold)
    assert ours == run(config, tmp_path / "cached", cold)
    assert len(vllm.sampled) == STEPS * 4


def test_vllm_is_handed_the_rounded_weights(vllm: Behaviour, policy: Policy) -> None:
    draw_as_cached(vllm, 7)
    rounded = [make_engine(name, policy, "int4").sample(request()) for name in ("vllm", "cached")]
    assert_same_rollout(*rounded)
    plain = CachedEngine(policy).sample(request())
    assert not torch.equal(rounded[0].rollout_logprobs, plain.rollout_logprobs)


def test_an_engine_equal_to_the_trainer_makes_r3_equal_r2(
    vllm: Behaviour, tmp_path: Path, cold: Path
) -> None:
    r2 = run(tiny(engine="vllm", routing_replay="R2"), tmp_path / "r2", cold)
    r3 = run(tiny(engine="vllm", routing_replay="R3"), tmp_path / "r3", cold)
    for ours, theirs in zip(r2[1], r3[1], strict=True):
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_an_engine_equal_to_the_trainer_has_no_mismatch_at_any_temperature(
    temperature: float, vllm: Behaviour, tmp_path: Path, cold: Path
) -> None:
    steps, _ = run(tiny(engine="vllm", temperature=temperature), tmp_path / "run", cold)
    for step in steps:
        assert step["mismatch/churn"] == 0.0
        assert abs(step["mismatch/kl_k1"]) < 1e-6
        assert step["mismatch/kl_k3"] < 1e-9


@pytest.mark.parametrize("layout", ["0.14", "0.21", "0.22"])
def test_every_layout_of_routes_gives_the_same_rollout(
    layout: str, vllm: Behaviour, policy: Policy
) -> None:
    """Prompts and responses of uneven length."""
    vllm.layout = layout
    draw_as_cached(vllm, 7)
    ours = VllmEngine(policy).sample(request())
    assert_same_rollout(ours, CachedEngine(policy).sample(request()))
    assert ours.routed_experts.dtype == torch.int16
    padding = ~ours.prompt_mask.repeat_interleave(GROUP, dim=0)
    assert padding.any() and (~ours.response_mask).any() and ours.truncated.any()
    assert (ours.routed_experts[:, : padding.shape[1]][padding] == -1).all()
    last = padding.shape[1] - 1 + ours.response_mask.sum(1)
    assert (ours.routed_experts[torch.arange(len(last)), last] == -1).all(), "read, but never fed"


def test_each_rollout_is_sampled_with_the_weights_of_its_moment(
    vllm: Behaviour, policy: Policy
) -> None:
    draw_as_cached(vllm, 7)
    engine = VllmEngine(policy)
    before = engine.sample(request())
    for parameter in policy.model.parameters():
        parameter.data.mul_(1.1)
    after = engine.sample(request())
    assert not torch.equal(before.rollout_logprobs, after.rollout_logprobs)
    assert_same_rollout(after, CachedEngine(policy).sample(request()))


def test_what_a_prompt_samples_is_decided_by_its_address_alone(
    vllm: Behaviour, policy: Policy
) -> None:
    engine = VllmEngine(policy)
    whole = engine.sample(request())
    part = engine.sample(request(numbers=range(2, 4)))
    length = part.response_ids.shape[1]
    assert torch.equal(whole.response_ids[2 * GROUP :, :length], part.response_ids)
    engine.sample(request(step=1))
    seeds = [params.seed for params in vllm.sampled]
    assert seeds[2:4] == seeds[4:6]
    assert len(set(seeds)) == 8


def test_vllm_is_asked_for_what_the_config_says(vllm: Behaviour, policy: Policy) -> None:
    policy = dataclasses.replace(policy, temperature=0.5)
    VllmEngine(policy).sample(request())
    for params in vllm.sampled:
        assert (params.n, params.max_tokens, params.temperature) == (GROUP, TOKENS, 0.5)
        assert params.logprobs == 0


def test_the_copies_of_the_weights_do_not_pile_up(vllm: Behaviour, policy: Policy) -> None:
    engine = VllmEngine(policy)
    for _ in range(2):
        engine.sample(request())
    folder = Path(engine._folder.name)
    assert len(list(folder.rglob("*.safetensors"))) == 1
    del engine
    assert not folder.exists()


def test_a_cached_prefix_of_the_prompt_has_no_record_and_is_chosen_live(
    vllm: Behaviour, policy: Policy
) -> None:
    vllm.layout = "0.21"
    routes = VllmEngine(policy).sample(request()).routed_experts
    assert (routes[0, 0] == -1).all() and (routes[0, 4] >= 0).all()


# Faults: each field, missing or malformed.

C = Callable[[Any], Any]


def on_completion(change: C) -> C:
    return lambda outputs: change(outputs[1].outputs[2])


def set_field(name: str, value: Any) -> C:
    return on_completion(lambda completion: setattr(completion, name, value))


def reroute(change: Callable[[np.ndarray], Any]) -> C:
    def spoil(completion: Any) -> None:
        completion.routed_experts = change(completion.routed_experts.copy())

    return on_completion(spoil)


def write(row: Any, value: Any) -> C:
    def change(routes: np.ndarray) -> np.ndarray:
        routes[row] = value
        return routes

    return reroute(change)


def relog(value: float) -> C:
    def spoil(completion: Any) -> None:
        completion.logprobs[0] = {completion.token_ids[0]: Logprob(value)}

    return on_completion(spoil)


HERE = "vLLM, request 1, completion 2: "
FAULTS: dict[str, tuple[C, str]] = {
    "outputs in another order": (
        lambda outputs: outputs.reverse(),
        "request 0: prompt_token_ids=.*expected the prompt that was sent",
    ),
    "a completion is missing": (
        lambda outputs: outputs[1].outputs.pop(),
        r"request 1: .* with completions \[0, 1\]: expected .* 3 completions",
    ),
    "aborted": (set_field("finish_reason", "abort"), HERE + "finish_reason='abort'"),
    "context too short": (
        on_completion(lambda c: vars(c).update(token_ids=[3, 3], finish_reason="length")),
        HERE + "finish_reason='length' after 2 of 6.*max_model_len",
    ),
    "no log-probs": (set_field("logprobs", None), HERE + r"logprobs is missing.*logprobs=0"),
    "log-prob NaN": (relog(float("nan")), HERE + "logprobs has NaN or inf"),
    "no routes": (
        set_field("routed_experts", None),
        HERE + "routed_experts is missing.*enable_return_routed_experts=True",
    ),
    "routes too few": (reroute(lambda r: r[:-2]), HERE + r"routed_experts: \d+ positions for"),
    "routes twice": (
        reroute(lambda r: np.repeat(r, 2, axis=0)),
        HERE + r"routed_experts: \d+ positions for",
    ),
    "routes of another top-k": (reroute(lambda r: r[:, :, :1]), HERE + "routed_experts: shape"),
    "routes beyond the experts": (write(0, [0, 8]), HERE + "routed_experts: ids range from"),
    "rows that were filled": (
        reroute(lambda r: 0 * r + np.arange(2, dtype=r.dtype)),
        r"vLLM, where sequence b is .*tokens hold 0..K-1 in every layer",
    ),
    "no record of the response": (
        write(-1, -1),
        r"vLLM, where sequence b .*no record where a resp.*= \[5, ",
    ),
}


@pytest.mark.parametrize(("spoil", "words"), FAULTS.values(), ids=FAULTS.keys())
def test_a_malformed_field_is_refused_by_request_and_name(
    spoil: C, words: str, vllm: Behaviour, policy: Policy
) -> None:
    vllm.spoil = spoil
    with pytest.raises((ValueError, FloatingPointError), match=words):
        VllmEngine(policy).sample(request())


def test_diverged_weights_end_the_run_as_with_the_cached_engine(
    vllm: Behaviour, tmp_path: Path, cold: Path
) -> None:
    vllm.spoil = relog(float("nan"))
    with pytest.raises(FloatingPointError, match=r"rollout step 0, .*vLLM, .*take a smaller one"):
        run(tiny(engine="vllm"), tmp_path / "run", cold)


def test_old_weights_that_stay_in_the_prefix_cache_are_an_error(
    vllm: Behaviour, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = VllmEngine(policy)
    engine.sample(request())
    monkeypatch.setattr(engine._llm, "reset_prefix_cache", lambda: False)
    with pytest.raises(ValueError, match="prefix cache"):
        engine.sample(request())


# The choice of the engine.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"router_noise": 0.1}, "engine=vllm with router_noise=0.1"),
        ({"old_logprobs": "rollout"}, "engine=vllm with old_logprobs=rollout"),
        ({"temperature": 0.005}, "engine=vllm with temperature=0.005"),
        ({"engine": "sglang"}, "engine='sglang'"),
    ],
)
def test_a_config_that_vllm_cannot_serve_is_refused(changes: dict[str, Any], words: str) -> None:
    values = RunConfig().to_dict() | {"engine": "vllm"} | changes
    with pytest.raises(ConfigError, match=words):
        RunConfig.from_dict(values)


def test_old_log_probs_straight_from_vllm_train_without_instruments(
    vllm: Behaviour, tmp_path: Path, cold: Path
) -> None:
    config = tiny(old_logprobs="rollout", instruments=False, routing_replay="R3")
    draw_as_cached(vllm, config.seed)
    ours = run(config.replace(engine="vllm"), tmp_path / "vllm", cold)
    assert ours == run(config, tmp_path / "cached", cold)


def test_without_the_package_nothing_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--preset", "tiny", "--engine", "vllm"]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "pip install 'moe-rl[vllm]'" in shown
    assert not list(tmp_path.iterdir())


def test_a_run_folder_from_before_there_was_a_choice_is_the_same_run(tmp_path: Path) -> None:
    config = tiny().named()
    RunLog(tmp_path / "run", config).close()
    file = tmp_path / "run" / "config.json"
    values = json.loads(file.read_text())
    del values["config"]["engine"]
    file.write_text(json.dumps(values))
    assert load_config(str(file)) == config
    RunLog(tmp_path / "run", config).close()


def test_the_cached_engine_is_the_default(policy: Policy) -> None:
    assert RunConfig().engine == "cached"
    assert isinstance(make_engine("cached", policy), CachedEngine)
