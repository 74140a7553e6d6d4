"""Configs: refused when they cannot work, with the field, the value and the fix."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_rl.config import SCHEMA, ConfigError, ModelConfig, RunConfig, load_config
from moe_rl.presets import PRESETS, preset


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"experts_per_token": 17}, "experts_per_token=17 with num_experts=16"),
        ({"num_experts": 0}, "num_experts=0: must be greater than or equal to 1"),
        ({"num_experts": 2**15}, "num_experts=32768: must be less than or equal to 32767"),
        ({"hidden_size": 32}, "hidden_size=32 with num_attention_heads=3"),
        ({"group_size": 1}, "group_size=1: must be greater than or equal to 2"),
        ({"updates_per_rollout": 5}, "updates_per_rollout=5.*divide"),
        ({"prompts_per_forward": 3}, "prompts_per_forward=3: does not divide"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan: must be a finite number"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"adam_beta2": 1.0}, "adam_beta2=1.0"),
        ({"seed": -1}, "seed=-1"),
        ({"slip": 1.5}, "slip=1.5"),
        ({"setting": "../evil"}, "setting='../evil': must match"),
        ({"task": "dataset"}, "task=dataset: no file to read"),
        ({"dataset": "rows.jsonl"}, "dataset='rows.jsonl' with task=running_sum"),
        ({"old_passes": 8, "old_logprobs": "rollout"}, "use old_logprobs=trainer"),
        ({"router_noise_passes": "update"}, "there is no noise to put there"),
        (
            {"router_noise_passes": "old", "router_noise": 0.3, "old_logprobs": "rollout"},
            "there is no old pass",
        ),
        ({"engine": "vllm", "router_noise": 0.1}, "engine=vllm with router_noise=0.1"),
        ({"engine": "vllm", "routing_replay": "TRR"}, "engine=vllm with routing_replay=TRR: vLLM"),
        ({"learning_rat": 1}, "learning_rat: unknown setting; did you mean 'learning_rate'?"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        RunConfig().replace(**changes)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"steps": "3"}, "steps='3': must be a valid integer"),
        ({"steps": 1.5}, "steps=1.5: must be a valid integer"),
        ({"freeze_router": 1}, "freeze_router=1: must be a valid boolean"),
        ({"algorithm": "ppp"}, "algorithm='ppp': must be 'grpo', 'dual_clip'"),
        ({"model": 3}, "model=3: must be an object"),
        ({"model": {"num_experts": 0}}, "model.num_experts=0: must be greater"),
        ({"model": {"num_expert": 4}}, "model.num_expert: unknown setting.*'num_experts'"),
        ({"model": {"experts_per_token": 17}}, "model.experts_per_token=17 with num_experts=16"),
        ({"learning_rate": float("inf")}, "learning_rate=inf: must be a finite number"),
    ],
)
def test_a_bad_value_in_a_file_is_refused_with_its_path(
    values: dict[str, Any], words: str, tmp_path: Path
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=words) as refused:
        load_config(str(file))
    assert str(refused.value).startswith(f"{file}: ") and "\n" not in str(refused.value)


@pytest.mark.parametrize("name", PRESETS)
def test_a_config_survives_json(name: str) -> None:
    config = preset(name)
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


def test_noise_on_hidden_states_is_placed_too() -> None:
    RunConfig(hidden_noise=1.2, router_noise_passes="rollout")


@settings(max_examples=200)
@given(st.dictionaries(st.sampled_from(sorted(RunConfig().to_dict())), VALUES, max_size=4))
def test_any_json_is_a_config_or_a_config_error(values: dict[str, Any]) -> None:
    try:
        config = RunConfig.from_dict(values)
    except ConfigError:
        return
    assert RunConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{\n "steps": 3,,\n}', "line 2"),
        (b"[]", "must be an object"),
        (b"\xff\xfe\x00", "decode"),
        (json.dumps({"schema": 99, "config": {}}).encode(), f"99, this version reads .* {SCHEMA}"),
    ],
)
def test_a_file_that_is_no_config_is_named(content: bytes, words: str, tmp_path: Path) -> None:
    file = tmp_path / "broken.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"broken\.json: .*{words}"):
        load_config(str(file))


def test_nested_fields_are_changed_without_a_prefix() -> None:
    config = RunConfig().replace(num_experts=4, task="countdown", learning_rate=1.0, slip=0.5)
    assert config.model == ModelConfig(num_experts=4)
    assert config.task.task == "countdown"
    assert (config.learning_rate, config.cold_start.slip) == (1.0, 0.5)
    config = RunConfig().replace(task="dataset", dataset="rows.jsonl", model=ModelConfig(), seed=3)
    assert (config.task.dataset, config.seed) == ("rows.jsonl", 3)


def test_configs_need_no_torch() -> None:
    code = "import sys, moe_rl.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
