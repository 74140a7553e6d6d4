"""vLLM as the rollout engine: what needs no vLLM. Its real tests run from here as well."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from small_policy import PROMPTS, rollout

from moe_rl.batch import RolloutBatch
from moe_rl.commands.cli import main
from moe_rl.config import ConfigError, RunConfig, load_config
from moe_rl.policy.policy import Policy
from moe_rl.presets import preset
from moe_rl.rollout import vllm_outputs
from moe_rl.rollout.cached import CachedEngine
from moe_rl.rollout.engine import make_engine
from moe_rl.rollout.request import Request
from moe_rl.rollout.vllm import check_version
from moe_rl.rollout.vllm_outputs import read_outputs
from moe_rl.run_folder.log import RunLog
from moe_rl.training.run import train

ROOT = Path(__file__).parents[2]
GROUP, TOKENS = 3, 6


# The real engine.


@pytest.mark.slow
def test_the_real_engine() -> None:
    """tests/real_vllm, in the environment that `make vllm` builds beside this one."""
    environment = Path(f"{sys.prefix}-vllm")
    if not (environment / ".installed").exists():
        pytest.skip("vLLM is not installed: make vllm")
    outer = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    command = [environment / "bin" / "python", "-m", "pytest", "-q", "tests/real_vllm"]
    found = subprocess.run(command, cwd=ROOT, env=outer, capture_output=True, text=True)
    print(found.stdout[-10_000:], found.stderr[-10_000:])
    assert found.returncode == 0, "tests/real_vllm failed: its output is below"


# What it returns.


def outputs_of(batch: RolloutBatch) -> list[Any]:
    """A rollout as the `RequestOutput`s that vLLM 0.30 returns: ids in uint8, no last row."""
    assert batch.routed_experts is not None
    outputs, width = [], batch.prompt_ids.shape[1]
    for p, (ids, kept) in enumerate(zip(batch.prompt_ids, batch.prompt_mask, strict=True)):
        prompt, completions = ids[kept].tolist(), []
        for g in range(GROUP):
            b = p * GROUP + g
            tokens = batch.response_ids[b, batch.response_mask[b]].tolist()
            values = batch.rollout_logprobs[b].tolist()
            fed = slice(width - len(prompt), width + len(tokens) - 1)
            completion = SimpleNamespace(
                index=g,
                token_ids=tokens,
                logprobs=[
                    {t: SimpleNamespace(logprob=v)} for t, v in zip(tokens, values, strict=False)
                ],
                routed_experts=batch.routed_experts[b, fed].numpy().astype(np.uint8),
                finish_reason="length" if batch.truncated[b] else "stop",
            )
            completions.append(completion)
        outputs.append(SimpleNamespace(prompt_token_ids=prompt, outputs=completions))
    return outputs


def read(outputs: list[Any], policy: Policy, batch: RolloutBatch) -> RolloutBatch:
    return read_outputs(
        outputs,
        policy=policy,
        prompt_ids=batch.prompt_ids,
        prompt_mask=batch.prompt_mask,
        group_size=GROUP,
        max_tokens=TOKENS,
    )


@pytest.mark.parametrize("last_row", [False, True], ids=["without", "with a last row"])
def test_outputs_are_read_as_the_rollout_that_they_are(policy: Policy, last_row: bool) -> None:
    batch = rollout(policy, PROMPTS, GROUP, TOKENS)
    assert (~batch.prompt_mask).any() and (~batch.response_mask).any() and batch.truncated.any()
    outputs = outputs_of(batch)
    for output in outputs:
        output.outputs.reverse()
        for completion in output.outputs if last_row else []:
            routes = completion.routed_experts
            completion.routed_experts = np.concatenate([routes, np.zeros_like(routes[:1])])
    found = read(outputs, policy, batch)
    for name in ("prompt_ids", "prompt_mask", "response_ids", "response_mask", "truncated"):
        assert torch.equal(getattr(found, name), getattr(batch, name)), name
    mask, width = batch.response_mask, batch.prompt_ids.shape[1]
    assert torch.equal(found.rollout_logprobs[mask], batch.rollout_logprobs[mask])
    assert found.routed_experts is not None and batch.routed_experts is not None
    assert found.routed_experts.dtype == torch.int16
    fed = torch.cat([batch.prompt_mask.repeat_interleave(GROUP, 0), mask], dim=1)
    fed[torch.arange(len(fed)), width - 1 + mask.sum(1)] = False  # the last token of a response
    assert torch.equal(found.routed_experts[fed], batch.routed_experts[fed])
    assert (found.routed_experts[~fed] == -1).all()


def test_every_token_that_ends_a_response_is_an_end(policy: Policy) -> None:
    policy.model.generation_config.eos_token_id = [1, 5]
    batch = rollout(policy, PROMPTS, GROUP, TOKENS)
    last = batch.response_mask.sum(1) - 1
    ends = batch.response_ids[torch.arange(len(last)), last][~batch.truncated]
    assert 5 in ends
    assert torch.equal(read(outputs_of(batch), policy, batch).truncated, batch.truncated)


def test_routers_are_searched_once_a_rollout(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search took most of the time of reading when it was made for each response."""
    calls = []
    record = vllm_outputs.record_for_model

    def counted(*args: Any) -> Any:
        calls.append(args)
        return record(*args)

    monkeypatch.setattr(vllm_outputs, "record_for_model", counted)
    batch = rollout(policy, PROMPTS, GROUP, TOKENS)
    read(outputs_of(batch), policy, batch)
    assert len(calls) == 1


Change = Callable[[Any], Any]


def on_completion(change: Change) -> Change:
    return lambda outputs: change(outputs[1].outputs[2])


def set_field(name: str, value: Any) -> Change:
    return on_completion(lambda completion: setattr(completion, name, value))


def reroute(change: Callable[[np.ndarray], Any]) -> Change:
    def spoil(completion: Any) -> None:
        completion.routed_experts = change(completion.routed_experts.astype(np.int16))

    return on_completion(spoil)


def write(row: Any, value: Any) -> Change:
    def change(routes: np.ndarray) -> np.ndarray:
        routes[row] = value
        return routes

    return reroute(change)


def relog(completion: Any) -> None:
    completion.logprobs[0] = {completion.token_ids[0]: SimpleNamespace(logprob=float("nan"))}


HERE = "vLLM, request 1, completion 2: "
FAULTS: dict[str, tuple[Change, str]] = {
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
    "log-prob NaN": (on_completion(relog), HERE + "logprobs has NaN or inf"),
    "no routes": (
        set_field("routed_experts", None),
        HERE + "routed_experts is missing.*enable_return_routed_experts=True",
    ),
    "routes too few": (reroute(lambda r: r[:-2]), HERE + r"routed_experts: shape .* for \d+ tok"),
    "routes twice": (
        reroute(lambda r: np.repeat(r, 2, axis=0)),
        HERE + r"routed_experts: shape .* for \d+ tok",
    ),
    "routes of another top-k": (reroute(lambda r: r[:, :, :1]), HERE + "routed_experts: shape"),
    "routes beyond the experts": (write(0, [0, 8]), HERE + "routed_experts: ids range from"),
    "routes of nothing": (write(..., 0), HERE + "routed_experts: every recorded id is 0"),
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
    spoil: Change, words: str, policy: Policy
) -> None:
    batch = rollout(policy, PROMPTS, GROUP, TOKENS)
    outputs = outputs_of(batch)
    spoil(outputs)
    with pytest.raises((ValueError, FloatingPointError), match=words):
        read(outputs, policy, batch)


# The choice of the engine.


@pytest.mark.parametrize(
    ("version", "on_cpu", "words"),
    [
        ("0.30.0", True, None),
        ("0.30.1+cpu", True, None),
        ("0.30.0", False, None),
        ("0.33.0", False, None),
        ("0.29.0", False, "older than 0.30"),
        *((f"0.{minor}.0", True, "returns no routes on a CPU") for minor in (27, 28, 29, 31, 32)),
    ],
)
def test_a_version_that_returns_no_routes_is_refused(
    version: str, on_cpu: bool, words: str | None
) -> None:
    if words is None:
        check_version(version, on_cpu=on_cpu)
    else:
        with pytest.raises(ConfigError, match=f"engine='vllm': vLLM {version} .*{words}"):
            check_version(version, on_cpu=on_cpu)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"router_noise": 0.1}, "engine=vllm with router_noise=0.1"),
        ({"temperature": 0.005}, "engine=vllm with temperature=0.005"),
        ({"engine": "sglang"}, "engine='sglang'"),
    ],
)
def test_a_config_that_vllm_cannot_serve_is_refused(changes: dict[str, Any], words: str) -> None:
    values = RunConfig().to_dict() | {"engine": "vllm"} | changes
    with pytest.raises(ConfigError, match=words):
        RunConfig.from_dict(values)


def test_without_the_package_nothing_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--preset", "tiny", "--engine", "vllm"]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "pip install 'moe-rl[vllm]'" in shown
    assert not list(tmp_path.iterdir())


def small(**changes: Any) -> RunConfig:
    sizes = {"steps": 1, "prompts_per_rollout": 4, "group_size": 4, "sft_steps": 20}
    return preset("tiny").replace(**sizes | changes)


def test_an_engine_without_router_logits_gives_old_log_probs_with_every_instrument(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, sample = small(old_logprobs="rollout"), CachedEngine.sample

    def run(name: str) -> list[dict[str, Any]]:
        train(config, tmp_path / name, cold_start_cache=tmp_path)
        files = [tmp_path / name / "steps.jsonl", tmp_path / name / "updates.jsonl"]
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]

    def without(engine: CachedEngine, request: Request) -> RolloutBatch:
        return dataclasses.replace(sample(engine, request), router_logits=None)

    theirs = run("theirs")
    monkeypatch.setattr(CachedEngine, "sample", without)
    for ours, line in zip(run("ours"), theirs, strict=True):
        known = {k: v for k, v in line.items() if isinstance(v, float) and "seconds" not in k}
        assert {k: ours[k] for k in known} == pytest.approx(known, rel=1e-3, abs=1e-6)


def test_a_run_folder_from_before_there_was_a_choice_is_the_same_run(tmp_path: Path) -> None:
    config = small().named()
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
