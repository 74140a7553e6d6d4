"""Configs: refused when they cannot work, with the field, the value and the fix."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_rl.config import PRESETS, ConfigError, ModelConfig, RunConfig, load_config, preset


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"experts_per_token": 17}, "experts_per_token=17 with num_experts=16"),
        ({"num_experts": 0}, "num_experts=0"),
        ({"hidden_size": 30}, "hidden_size=30 with num_attention_heads=4"),
        ({"group_size": 1}, "group_size=1.*at least 2"),
        ({"updates_per_rollout": 5}, "updates_per_rollout=5.*divisor"),
        ({"prompts_per_forward": 3}, "prompts_per_forward=3: must divide"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"router_noise": -0.1}, "router_noise=-0.1"),
        ({"adam_beta2": 1.0}, "adam_beta2=1.0"),
        ({"clip_low": 0.0}, "clip_low=0.0"),
        ({"steps": 0}, "steps=0"),
        ({"seed": -1}, "seed=-1"),
        ({"slip": 1.5}, "slip=1.5"),
        ({"digits": 0}, "digits=0"),
        ({"routing_replay": "R2", "old_logprobs": "rollout"}, "use R3, or old_logprobs=trainer"),
        ({"no_such_field": 1}, "no_such_field"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        RunConfig().replace(**changes)


@pytest.mark.parametrize("name", PRESETS)
def test_a_config_survives_json(name: str) -> None:
    config = preset(name)
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"learning_rat: unknown.*'learning_rate'"):
        RunConfig.from_dict({"learning_rat": 1e-3})
    with pytest.raises(ConfigError, match=r"model\.num_expert: unknown.*'num_experts'"):
        RunConfig.from_dict({"model": {"num_expert": 4}})
    with pytest.raises(ConfigError, match=r"preset='stalenes'.*'staleness'"):
        preset("stalenes")


@pytest.mark.parametrize(
    "values",
    [{"steps": "3"}, {"steps": 1.5}, {"freeze_router": 1}, {"algorithm": "ppo"}, {"model": 3}],
)
def test_a_value_of_the_wrong_type_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        RunConfig.from_dict(values)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(sorted(RunConfig().to_dict())), json_values, max_size=4))
def test_any_json_is_a_config_or_a_config_error(values: dict[str, Any]) -> None:
    try:
        config = RunConfig.from_dict(values)
    except ConfigError:
        return
    assert RunConfig.from_dict(config.to_dict()) == config


def test_a_file_that_is_no_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(str(tmp_path / "absent.json"))
    (tmp_path / "broken.json").write_text('{\n "steps": 3,,\n}')
    with pytest.raises(ConfigError, match=r"broken\.json, line 2: not JSON"):
        load_config(str(tmp_path / "broken.json"))
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ConfigError, match="expected an object"):
        load_config(str(tmp_path / "list.json"))
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(str(tmp_path / "binary.json"))


def test_nested_fields_are_changed_without_a_prefix() -> None:
    config = RunConfig().replace(num_experts=4, task="countdown", learning_rate=1.0, slip=0.5)
    assert config.model == ModelConfig(num_experts=4)
    assert config.task.task == "countdown"
    assert (config.learning_rate, config.cold_start.slip) == (1.0, 0.5)


def test_configs_need_no_torch() -> None:
    code = "import sys, moe_rl.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_config_of_another_schema_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"schema": 99, "config": preset("tiny").to_dict()}))
    with pytest.raises(ConfigError, match="schema 99, this version reads schema 1"):
        load_config(str(file))


def test_a_number_beyond_floats_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"learning_rate: \d+ digits are too many"):
        RunConfig.from_dict({"learning_rate": 10**400})


def test_a_key_given_twice_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"model": {"num_experts": 4, "num_experts": 8}}')
    with pytest.raises(ConfigError, match="num_experts: given twice"):
        load_config(str(file))
