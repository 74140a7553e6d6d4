"""The table of algorithms: names, published defaults, options and clip scales."""

import math

import pytest

from moe_rl.losses import ALGORITHMS, find_algorithm, resolve_options
from moe_rl.losses.grpo import grpo_loss

NAMES = list(ALGORITHMS)
CLIPPED = [name for name in NAMES if "clip_low" in ALGORITHMS[name].options]
GRPO_CLIP = {"clip_low": 0.2, "clip_high": 0.27}
GSPO_CLIP = {"clip_low": 3e-4, "clip_high": 4e-4}


def test_algorithms_are_found_by_name_and_a_typo_gets_the_list() -> None:
    assert find_algorithm("grpo").loss is grpo_loss
    with pytest.raises(ValueError, match=r"algorithm='gspo-token': unknown; use one of grpo, "):
        find_algorithm("gspo-token")


def test_every_default_is_the_one_of_its_paper() -> None:
    """Each with its place in the docstring of its loss."""
    assert {name: dict(ALGORITHMS[name].options) for name in NAMES} == {
        "grpo": GRPO_CLIP,
        "dual_clip": GRPO_CLIP | {"bound": 3.0},
        "dr_grpo": GRPO_CLIP,
        "dapo": {"clip_low": 0.2, "clip_high": 0.28},
        "ppo": {"clip_low": 0.2, "clip_high": 0.2, "value_clip": 0.2, "value_coef": 0.1},
        "cispo": {"bound": 5.0},
        "tis": GRPO_CLIP | {"bound": 2.0},
        "mis": GRPO_CLIP | {"bound": 2.0},
        "geo_rs": GRPO_CLIP | {"lowest": 0.99, "highest": 1.01},
        "icepop": GRPO_CLIP | {"lowest": 0.5, "highest": 5.0},
        "dppo_tv": {"distance": 0.2, "bound": 5.0},
        "gmpo": {"log_clip": 0.4},
        "sapo": {"tau_positive": 1.0, "tau_negative": 1.05},
        "rspo": {"log_clip": 0.4, "lowest": 0.7},
        "gspo": GSPO_CLIP,
        "gspo_token": GSPO_CLIP,
        "policy_gradient": {},
        "positive_only": {"clip_high": 0.27},
    }


def test_means_and_advantages_are_those_of_the_papers() -> None:
    by_mean = {how: {n for n in NAMES if ALGORITHMS[n].aggregation == how} for how in
               ("token_mean", "fixed_length")}  # fmt: skip
    assert by_mean == {
        "token_mean": {"dapo", "ppo", "cispo"},
        "fixed_length": {"dr_grpo", "dppo_tv"},
    }
    unscaled = {name for name in NAMES if not ALGORITHMS[name].scale_advantages}
    assert unscaled == by_mean["fixed_length"]
    assert [name for name in NAMES if ALGORITHMS[name].reads_routers] == ["rspo"]
    assert [name for name in NAMES if ALGORITHMS[name].learns_value] == ["ppo"]


@pytest.mark.parametrize("name", NAMES)
def test_options_are_the_defaults_but_for_what_is_given(name: str) -> None:
    algorithm = ALGORITHMS[name]
    defaults = resolve_options(name, algorithm, {"clip_low": None, "anything": None})
    assert defaults == algorithm.options
    assert resolve_options(name, algorithm, defaults) == defaults
    for key, value in defaults.items():
        assert resolve_options(name, algorithm, {key: value * 1.01}) == defaults | {
            key: value * 1.01
        }


@pytest.mark.parametrize("name", NAMES)
def test_an_option_that_the_loss_does_not_have_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"boundary=1: no option of {name}, which has .*leave"):
        resolve_options(name, ALGORITHMS[name], {"boundary": 1.0})


@pytest.mark.parametrize("value", [0.0, -2.0, math.nan])
@pytest.mark.parametrize(
    ("name", "option"),
    [
        (name, option)
        for name in NAMES
        for option in ALGORITHMS[name].options
        if option not in GRPO_CLIP
    ],
)
def test_an_option_that_is_not_positive_is_refused(name: str, option: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{option}=.*: not above 0; the default of {name} is"):
        resolve_options(name, ALGORITHMS[name], {option: value})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dual_clip", {"bound": 0.5}, r"bound=0\.5: not above 1"),
        ("dual_clip", {"bound": 1.0}, "bound=1: not above 1"),
        ("icepop", {"lowest": 5.0}, r"lowest=5: not below highest=5"),
        ("icepop", {"lowest": 2.0, "highest": 0.5}, r"lowest=2: not below highest=0\.5"),
    ],
)
def test_bounds_that_leave_nothing_are_refused(
    name: str, options: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_options(name, ALGORITHMS[name], options)


@pytest.mark.parametrize("name", CLIPPED)
def test_a_clip_range_on_the_scale_of_the_other_ratio_is_refused(name: str) -> None:
    algorithm = ALGORITHMS[name]
    other = GRPO_CLIP if algorithm.ratio == "sequence" else GSPO_CLIP
    with pytest.raises(ValueError, match=r"clip_low=.*0\.2 and 0\.27.*3e-4 and 4e-4"):
        resolve_options(name, algorithm, other)
    with pytest.raises(ValueError, match="clip_high"):
        resolve_options(name, algorithm, {"clip_high": other["clip_high"]})
    allowed = resolve_options(name, algorithm, other, allow_any_scale=True)
    assert allowed == algorithm.options | other


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        ({"clip_low": -0.1}, r"clip_low=-0\.1.*from 0 to 1"),
        ({"clip_low": 1.5}, r"clip_low=1\.5.*from 0 to 1"),
        ({"clip_high": math.nan}, "clip_high=nan"),
    ],
)
@pytest.mark.parametrize("name", CLIPPED)
def test_allowing_any_scale_still_refuses_an_impossible_range(
    name: str, clip: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_options(name, ALGORITHMS[name], clip, allow_any_scale=True)
