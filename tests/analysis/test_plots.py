"""Tests of the analysis room: what figures show, for data that log axes and medians dislike."""

import math

import matplotlib as mpl
import numpy as np
import pytest
import synthetic

from moe_rl.analysis.data.load import load_study
from moe_rl.analysis.data.measures import run_measures
from moe_rl.analysis.plots import noise, ratios, routing, summary, training
from moe_rl.analysis.plots.style import (
    COLUMN,
    DARK_PARTNERS,
    WIDE,
    colour,
    legend,
    plain_number,
    styled,
)
from moe_rl.analysis.report.svg import settle
from moe_rl.experiments.arms import ARMS


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    arms = ["grpo", "gspo", "dense"]
    return load_study(synthetic.write_study(root, arms=arms, seeds=2, steps=6, updates=2))


def _words(figure):
    return " ".join(text.get_text() for text in figure.findobj(mpl.text.Text))


def test_every_seed_is_a_line_and_the_median_another(study):
    axes = training.gradient_norm(study.updates).axes[0]
    assert len(axes.lines) == 3 * (2 + 1)


def test_a_collapse_is_marked(study):
    axes = training.reward_by_arm(study.steps).axes[1]  # GRPO's panel
    assert sum(line.get_marker() == "^" for line in axes.lines) == 2


def test_what_a_dense_model_cannot_do_is_said_and_not_drawn(study):
    assert "0 by construction" in _words(routing.churn_by_layer(study.updates))
    assert "dense control: 0 by construction" in _words(
        ratios.routing_against_weights(study.updates)
    )


def test_zeros_stay_off_log_axes_and_are_named(study):
    updates = study.updates.copy()
    updates.loc[updates["arm"] == "grpo", "clip_ratio/region"] = 0.0
    figure = training.clip_share(updates)
    assert "0 throughout, not on a log axis: GRPO" in _words(figure)
    drawn = np.concatenate([line.get_ydata() for line in figure.axes[0].lines])
    assert not (drawn == 0).any()


def test_on_policy_ratios_are_said_to_be_zero_by_construction(study):
    first = study.updates[study.updates["update"] == 0]
    figure = ratios.ratio_variance(first)
    assert "one update per rollout" in _words(figure)
    assert all(axes.get_yscale() == "linear" for axes in figure.axes)


def test_non_finite_numbers_leave_gaps(study):
    updates = study.updates.copy()
    updates.loc[updates["step"] == 2, "grad_norm"] = math.inf
    updates.loc[updates["step"] == 3, "grad_norm"] = math.nan
    settle(training.gradient_norm(updates))


def test_drawing_leaves_matplotlib_as_it_was(study):
    before = dict(mpl.rcParams)
    settle(training.chain(study.steps, study.updates))
    assert dict(mpl.rcParams) == before


def test_every_arm_has_its_own_colour_with_a_dark_partner():
    assert len({arm.colour for arm in ARMS.values()}) == len(ARMS)
    assert {arm.colour for arm in ARMS.values()} <= set(DARK_PARTNERS)
    assert colour("an arm of yours") in DARK_PARTNERS


def _luminance(colour_code):
    channels = [int(colour_code[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one, other):
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("arm", ARMS.values(), ids=lambda arm: arm.name)
def test_arm_colours_stand_out_on_light_and_dark_pages(arm):
    # WCAG 2.1, 1.4.11: graphics need a contrast of 3 to what is next to them.
    light_page, dark_page = "#fdfdfc", DARK_PARTNERS["#fdfdfc"]
    assert _contrast(arm.colour, light_page) >= 3
    assert _contrast(arm.dark_colour, dark_page) >= 3


@pytest.mark.parametrize(
    ("value", "words"),
    [(1e-4, "10\u207b\u2074"), (2e-5, "2\u00b710\u207b\u2075"), (0.001, "0.001"), (100, "100")],
)
def test_log_labels_are_plain_numbers_or_powers(value, words):
    assert plain_number(value) == words


def test_the_noise_response_shows_every_seed_of_the_longest_ladder(tmp_path):
    root = synthetic.write_map(tmp_path / "map", seeds=2, noises=(0.0, 0.1, 0.3))
    measures = run_measures(load_study(root))
    ladder = noise.noise_ladder(measures)
    assert ladder[["learning_rate", "updates_per_rollout"]].drop_duplicates().shape[0] == 1
    assert set(ladder["router_noise"]) == {0.0, 0.1, 0.3}
    final = noise.noise_response(measures).axes[2]
    dots = sum(len(points.get_offsets()) for points in final.collections)
    assert dots == len(ladder) == 4 * 3 * 2
    assert noise.noise_ladder(measures[measures["router_noise"] < 0.2]).empty


def test_the_summary_shows_the_arms_that_tell_the_story(tmp_path):
    root = synthetic.write_study(tmp_path / "s", seeds=2, steps=6, updates=2)
    study = load_study(root)
    words = _words(summary.summary(study.steps, study.updates))
    assert "GRPO + replay" in words and "dense control" in words and "frozen" not in words
    other = [frame[frame["arm"] == "frozen-router"] for frame in (study.steps, study.updates)]
    assert "frozen router" in _words(summary.summary(*other))


@pytest.mark.parametrize("width", [WIDE, COLUMN])
@pytest.mark.parametrize("count", [2, 3, 4, 6, 7])
@styled
def test_a_legend_lies_inside_its_figure(width, count):
    figure = mpl.figure.Figure(figsize=(width, 3), layout="constrained")
    figure.subplots()
    legend(figure, [*ARMS][:count])
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1
