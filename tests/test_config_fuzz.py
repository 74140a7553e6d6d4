"""The config loader against whatever a file may hold: a config that comes back, or an error.

The error names the file, and the key that is at fault.
"""

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moe_rl.config import PRESETS, SCHEMA, ConfigError, RunConfig, load_config, preset

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**400), 10**400)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["auto", "grpo", "R2", "R3", "rollout", "dataset", "countdown", 1, 2, 0]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "c.json"


def load(file: Path) -> RunConfig | str:
    """A config that survives being written, or what is said of the file, in one line."""
    try:
        config = load_config(str(file))
    except ConfigError as error:
        said = str(error)
        assert said.startswith(str(file)), said
        assert "\n" not in said and len(said) < 1000
        return said
    assert isinstance(config, RunConfig)
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    return config


@settings(max_examples=300)
@given(raw=st.binary(max_size=80))
def test_any_bytes_are_refused_by_name(raw: bytes, file: Path) -> None:
    file.write_bytes(raw)
    load(file)


@settings(max_examples=200)
@given(value=VALUES, wrapped=st.booleans())
def test_any_json_is_a_config_or_refused_by_name(value: Any, wrapped: bool, file: Path) -> None:
    file.write_text(json.dumps({"schema": SCHEMA, "config": value} if wrapped else value))
    load(file)


def places(values: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Every key of a nested config, with the object it is in."""
    for key, value in values.items():
        yield values, key
        if isinstance(value, dict):
            yield from places(value)


@settings(max_examples=600)
@given(data=st.data(), name=st.sampled_from(sorted(PRESETS)))
def test_a_changed_value_is_taken_or_named(data: st.DataObject, name: str, file: Path) -> None:
    values = preset(name).to_dict()
    owner, key = data.draw(st.sampled_from(list(places(values))))
    owner[key] = data.draw(VALUES)
    file.write_text(json.dumps(values))
    found = load(file)
    inside = owner[key] if isinstance(owner[key], dict) else {}
    assert isinstance(found, RunConfig) or any(k in found for k in (key, *map(repr, inside))), found


@settings(max_examples=200)
@given(data=st.data(), name=st.sampled_from(sorted(PRESETS)), other=st.text(max_size=80))
def test_a_changed_key_is_named(data: st.DataObject, name: str, other: str, file: Path) -> None:
    values = preset(name).to_dict()
    owner, key = data.draw(st.sampled_from(list(places(values))))
    value = owner.pop(key)
    assume(other not in owner)  # hypothesis draws words that it finds in our code
    owner[other] = value
    file.write_text(json.dumps(values))
    found = load(file)
    if other != key:
        assert isinstance(found, str) and ("unknown setting" in found)


@settings(max_examples=300)
@given(data=st.data(), name=st.sampled_from(sorted(PRESETS)))
def test_a_damaged_file_is_a_config_or_refused_by_name(
    data: st.DataObject, name: str, file: Path
) -> None:
    raw = bytearray(json.dumps(preset(name).to_dict(), indent=2).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    file.write_bytes(raw)
    load(file)


EXTREMES = [10**400, -(10**400), 1e308, -1e308, 5e-324, math.nan, math.inf, -0.0, 2**63, -1, ""]


@pytest.mark.parametrize("value", [*EXTREMES, "\ud800", "a\nb", True, None, [], {}], ids=repr)
def test_an_extreme_value_anywhere_is_taken_or_named(value: Any, file: Path) -> None:
    for place in range(len(list(places(preset("tiny").to_dict())))):
        values = preset("tiny").to_dict()
        owner, key = list(places(values))[place]
        owner[key] = value
        file.write_text(json.dumps(values))
        found = load(file)
        assert isinstance(found, RunConfig) or key in found, found


@pytest.mark.parametrize("closed", [True, False])
def test_nesting_of_any_depth_is_refused_by_name(closed: bool, file: Path) -> None:
    """Around Python's limit too; not by hypothesis, which raises it for its tests."""
    said = set()
    for depth in (1, 10, *range(800, 1000), 100_000):
        file.write_text('{"steps": ' + "[" * depth + ("]" * depth + "}" if closed else ""))
        found = load(file)
        assert isinstance(found, str)
        said.add(next(words for words in ("steps=[", "too deep", "not JSON") if words in found))
    assert said == {"steps=[" if closed else "not JSON", "too deep"}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_comes_back_from_a_file(name: str, file: Path) -> None:
    values = copy.deepcopy(preset(name).to_dict())
    file.write_text(json.dumps({"schema": SCHEMA, "config": values}))
    assert load(file) == preset(name)
