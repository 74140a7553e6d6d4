"""A user's own loss: the same run as ours for the same formula, and one line for what is wrong."""

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Killed, assert_same_run, killed_after, lines

from moe_rl.config import ConfigError, RunConfig
from moe_rl.losses import LossInputs, resolve_options
from moe_rl.losses.custom import check_loss, load_loss
from moe_rl.presets import preset
from moe_rl.run_folder.log import is_complete
from moe_rl.training.run import resolve, train

GRPO = """
from moe_rl.losses.base import clipped_surrogate

def my_loss(inputs, *, clip_low=0.2, clip_high=0.27):
    return -clipped_surrogate(inputs.log_ratio, inputs.advantages, clip_low, clip_high)
"""
PLAIN = (
    "def my_loss(inputs, *, scale=1.0):\n    return -scale * inputs.advantages * inputs.logprobs\n"
)


def write(folder: Path, text: str) -> str:
    (folder / "own.py").write_text(text)
    return f"{folder}/own.py:my_loss"


def tiny(**changes: Any) -> RunConfig:
    return preset("tiny").replace(**{"sft_steps": 2, "steps": 2, "save_every": 2} | changes).named()


@pytest.fixture(scope="module")
def cold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cold")


def test_the_formula_of_grpo_in_a_file_is_bitwise_the_run_of_grpo(
    tmp_path: Path, cold: Path
) -> None:
    common = {"sft_steps": 100, "router_noise": 0.3}
    own = tiny(loss=write(tmp_path, GRPO), **common)
    assert own.arm == "my_loss"
    train(own, tmp_path / "own", cold_start_cache=cold)
    train(tiny(algorithm="grpo", **common), tmp_path / "grpo", cold_start_cache=cold)
    assert_same_run(tmp_path / "own", tmp_path / "grpo")
    assert any(line["grad_norm"] > 0 for line in lines(tmp_path / "own", "updates.jsonl"))


def test_options_are_the_keyword_arguments_on_any_scale(tmp_path: Path) -> None:
    name = write(tmp_path, GRPO)
    assert load_loss(name).options == {"clip_low": 0.2, "clip_high": 0.27}
    assert resolve(tiny(loss=name, clip_high=4e-4)).loss_sha256 == load_loss(name).sha256
    assert resolve(tiny(loss=write(tmp_path, PLAIN), loss_options={"scale": -1.0})).arm == "my_loss"
    name = write(tmp_path, GRPO)
    with pytest.raises(ValueError, match=r"bound=4: no option of .*own.py:my_loss, which has clip"):
        resolve(tiny(loss=name, loss_options={"bound": 4.0}))


def returning(value: str) -> str:
    return f"import torch\n\ndef my_loss(inputs):\n    return {value}\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def my_loss(inputs:\n    pass\n", "own.py, line 1: SyntaxError: .*; correct the file"),
        ("x = 1\nimport no_such_package\n", "own.py, line 2: ModuleNotFoundError: No module"),
        ("x = 1\n", "has no function 'my_loss'; define one"),
        ("def my_los(inputs):\n    pass\n", "no function 'my_loss'; did you mean 'my_los'"),
        ("def my_loss(inputs, clip=0.2):\n    pass\n", r"arguments are \(inputs, clip=0.2\); take"),
        ("def my_loss(*, clip=0.2):\n    pass\n", r"arguments are \(\*, clip=0.2\); take inputs"),
        ("def my_loss(inputs, *, clip):\n    pass\n", "option 'clip' has no number for a default"),
        ("def my_loss(inputs, *, on=True):\n    pass\n", "option 'on' has no number for a default"),
        (returning("inputs.logprobs.mean()"), r"returned \[\] for inputs of shape \[6, 5\]"),
        (returning("inputs.logprobs.sum(1, keepdim=True)"), r"returned \[6, 1\] for inputs"),
        (returning("None"), "returned NoneType for inputs of shape"),
        (returning("inputs.logprobs.detach()"), "no gradient reaches inputs.logprobs"),
        (returning("0 * inputs.logprobs"), "no gradient reaches inputs.logprobs"),
        (returning("-inputs.logprobs * inputs.advantages.neg_()"), "changes inputs.advantages in"),
        (returning("inputs.logprobs.mul_(2)"), "changes inputs.logprobs in place"),
        (returning("inputs.logprobs / inputs.log_ratio"), "its loss is NaN or inf on policy"),
        (returning("inputs.logprobs / inputs.advantages"), "its loss is NaN or inf on policy"),
        (returning("inputs.log_ratio.abs().sqrt()"), "its gradient is NaN or inf on policy"),
        (returning("inputs.logprobs + (inputs.log_ratio * 1e3).exp()"), "is NaN or inf off policy"),
        (returning("inputs.no_such_field"), "line 4: AttributeError: .*no_such_field"),
        (returning("inputs.logprobs.exp().mul_(2)"), "RuntimeError: "),
    ],
)
def test_a_bad_loss_is_refused_in_one_line_before_a_run_is_made(
    text: str, words: str, tmp_path: Path
) -> None:
    name = write(tmp_path, text)
    with pytest.raises(ConfigError, match=words) as refused:
        train(tiny(loss=name), tmp_path / "run", cold_start_cache=tmp_path / "cold")
    assert str(refused.value).startswith(f"loss={name!r}: ") and "\n" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["own.py"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss": "nowhere.py:my_loss"}, "nowhere.py cannot be read .No such file"),
        ({"loss": "own.py"}, "no FILE.py:FUNCTION; give one, as in my_loss.py:my_loss"),
        ({"loss": "own.py:my-loss"}, "no FILE.py:FUNCTION"),
        ({"loss": "own.py:f", "algorithm": "gspo"}, "takes the algorithm's place"),
        ({"loss_sha256": "0" * 64}, "no file to check"),
    ],
)
def test_a_loss_that_is_named_wrongly_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        resolve(preset("tiny").replace(**changes))


def test_a_run_is_not_resumed_with_a_file_that_was_changed(tmp_path: Path, cold: Path) -> None:
    config = tiny(loss=write(tmp_path, PLAIN), checkpoint_every=1)
    run = tmp_path / "run"
    with pytest.raises(Killed), killed_after(5):
        train(config, run, cold_start_cache=cold)
    pinned = resolve(config)
    write(tmp_path, PLAIN + "# changed\n")
    for again, words in (
        (pinned, "the file was changed"),
        (config, "holds a run with loss_sha256"),
    ):
        with pytest.raises(ConfigError, match=words):
            train(again, run, cold_start_cache=cold, resume=True)
    write(tmp_path, PLAIN)
    train(pinned, run, cold_start_cache=cold, resume=True)
    assert is_complete(run)


def test_an_error_in_mid_run_names_the_file_and_the_line(tmp_path: Path, cold: Path) -> None:
    text = PLAIN + "    # never reached\n"
    text = text.replace(":\n", ":\n    assert len(inputs.mask) < 16, 'too many'\n", 1)
    with pytest.raises(ConfigError, match=r"own.py, line 2: AssertionError: too many"):
        train(tiny(loss=write(tmp_path, text)), tmp_path / "run", cold_start_cache=cold)


def test_routers_are_recorded_for_a_file_that_names_their_shift_alone(
    tmp_path: Path, cold: Path
) -> None:
    assert not load_loss(write(tmp_path, PLAIN)).reads_routers
    name = write(tmp_path, PLAIN.replace("-scale", "-scale * inputs.router_shift"))
    config = tiny(loss=name, instruments=False, router_noise=0.3)
    train(config, tmp_path / "run", cold_start_cache=cold)
    algorithm = load_loss(name)
    check_loss(name, algorithm, resolve_options(name, algorithm, {}))


def test_padding_of_an_own_loss_may_be_nan(tmp_path: Path) -> None:
    name = write(tmp_path, returning("inputs.logprobs * inputs.mask / inputs.mask"))
    check_loss(name, load_loss(name), {})


def test_a_file_may_define_dataclasses_and_leaves_no_cache(tmp_path: Path) -> None:
    text = "from __future__ import annotations\nfrom dataclasses import dataclass\n\n"
    text += "@dataclass\nclass Clip:\n    low: float = 0.2\n\n"
    algorithm = load_loss(write(tmp_path, text + PLAIN))
    inputs = LossInputs(
        **dict.fromkeys(("logprobs", "old_logprobs", "rollout_logprobs"), torch.ones(2, 3)),
        advantages=torch.ones(2, 3),
        mask=torch.ones(2, 3, dtype=torch.bool),
    )
    assert torch.equal(algorithm.loss(inputs, scale=2.0), torch.full((2, 3), -2.0))
    assert [path.name for path in tmp_path.iterdir()] == ["own.py"]
