"""Tests of analysis: what figures show, for data that log axes and medians dislike."""

import math
from pathlib import Path
from typing import get_args

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import synthetic

from moe_rl.analysis.data.load import load_study
from moe_rl.analysis.data.measures import run_measures
from moe_rl.analysis.plots import (
    branches,
    noise,
    ratios,
    remedies,
    response,
    restarts,
    routing,
    summary,
    tails,
    tolerance,
    training,
)
from moe_rl.analysis.plots.style import (
    COLUMN,
    DARK_PARTNERS,
    LEAD_ARMS,
    MOST_POINTS,
    WIDE,
    colour,
    in_blocks,
    lead_arms,
    legend,
    line_style,
    plain_number,
    styled,
    wrapped,
)
from moe_rl.analysis.report.svg import settle
from moe_rl.config import StudyName
from moe_rl.experiments.arms import ARMS, arm_key
from moe_rl.experiments.studies import study_plan
from moe_rl.metrics.ratios import SURVIVAL


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
    figure = training.gradient_norm(updates)
    settle(figure)
    heights = [line.get_ydata() for line in figure.axes[0].lines]
    assert heights and not any(np.isinf(np.asarray(line, dtype=float)).any() for line in heights)


def test_drawing_leaves_matplotlib_as_it_was(study):
    before = dict(mpl.rcParams)
    settle(training.chain(study.steps, study.updates))
    assert dict(mpl.rcParams) == before


def test_arms_of_the_table_have_their_own_looks_and_colours_have_dark_partners():
    assert len({colour(arm) for arm in LEAD_ARMS}) == len(LEAD_ARMS)
    assert len({str(line_style(arm)) for arm in ARMS}) == len(ARMS)
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


def test_every_complete_seed_is_a_dot_open_where_it_collapsed(study):
    measures = run_measures(study)
    measures.loc[0, "complete"] = False
    axes = remedies.final_rewards(measures, study.settings).axes[0]
    faces = np.concatenate([row.get_facecolors() for row in axes.collections])
    assert sum(len(row.get_offsets()) for row in axes.collections) == len(measures) - 1
    done = measures[measures["complete"]]
    assert sum(face[3] == 0 for face in faces) == done["collapsed"].sum() == 1
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "GRPO", "GSPO", "dense control"
    ]  # fmt: skip


def test_an_arm_that_a_setting_lacks_is_said_to_be_absent(tmp_path):
    for setting, arms in (("a", ["grpo", "gspo"]), ("b", ["grpo"])):
        synthetic.write_study(tmp_path, arms=arms, seeds=1, steps=4, updates=1, settings=(setting,))
    (tmp_path / "study.json").unlink()
    study = load_study(tmp_path)
    assert _words(remedies.final_rewards(run_measures(study), study.settings)).count("not run") == 1
    assert _words(remedies.reward_side_by_side(study.steps, study.settings)).count("not run") == 1


def test_a_row_of_panels_has_the_arms_that_one_of_its_settings_ran(study):
    measures = run_measures(study)
    settings = [*"abcd"]
    last = measures[measures["arm"] != "grpo"].assign(setting="d")
    copies = pd.concat([*(measures.assign(setting=name) for name in "abc"), last])
    panels = remedies.final_rewards(copies, settings).axes
    rows = [len(panels[first].get_yticklabels()) for first in (0, 3)]
    assert rows == [3, 2]


@pytest.mark.parametrize("places", [range(1000), range(0, 2000, 2), range(1, 1001)])
def test_a_run_of_many_steps_is_drawn_by_means(places):
    places = pd.Index(places)
    steps = pd.DataFrame({"reward": np.arange(1000.0) % 2}, index=places)
    drawn, width = in_blocks(steps, places)
    assert width == 16 and len(drawn) <= MOST_POINTS
    assert (drawn["reward"] == 0.5).all()
    assert drawn.index[1] == np.mean(places[16:32])
    # A run that has not got as far has the same blocks, and an infinite value hides no other.
    steps.loc[places[0], "reward"] = np.inf
    half, _ = in_blocks(steps[:500], places)
    assert half.index.equals(drawn.index[: len(half)]) and half["reward"].iloc[0] == 8 / 15
    few = steps[:MOST_POINTS]
    assert in_blocks(few, places[:MOST_POINTS])[0] is few


def test_a_setting_whose_first_arm_was_not_run_keeps_its_name(tmp_path):
    for setting, arms in (("both", ["grpo", "gspo"]), ("one", ["gspo"])):
        synthetic.write_study(tmp_path, arms=arms, seeds=1, steps=4, updates=1, settings=(setting,))
    (tmp_path / "study.json").unlink()
    study = load_study(tmp_path)
    figure = remedies.reward_side_by_side(study.steps, study.settings)
    names = [axes.yaxis.label for axes in figure.axes]
    assert [label.get_text() for label in names if label.get_text()] == study.settings
    assert all(axes.axison for axes in figure.axes)


def test_tails_are_read_where_they_are_logged():
    assert tails.RATIOS == SURVIVAL


def test_tails_lie_where_they_were_measured_and_zeros_on_a_tick_of_their_own(study):
    measures = run_measures(study)
    own, engine = tails.survival(study.updates, measures).axes
    for axes, prefix in ((own, "ratio"), (engine, "rollout_ratio")):
        at = study.updates[study.updates["arm"] == "gspo"]
        want = [at[f"{prefix}/survival_{t}"].mean() for t in tails.RATIOS]
        drawn = [line.get_ydata() for line in axes.lines if line.get_color() == colour("gspo")]
        floor = axes.get_ylim()[0]
        assert any(np.allclose(line, np.maximum(want, floor)) for line in drawn)
        assert floor in axes.get_yticks()
        assert axes.yaxis.get_major_formatter()(floor) == "0"
        mean = at[f"{prefix}/mean"].mean()
        assert f"mean w {mean:.3g}" in [text.get_text() for text in axes.texts]
    assert (np.array(engine.lines[0].get_ydata()) == 1 / np.array(tails.RATIOS)).all()


def test_the_unbounded_branch_stands_on_the_axis_and_all_branches_add_up_to_one(study):
    panel = branches.branch_mass(study.updates).axes[0]  # GRPO's
    own = study.updates[study.updates["arm"] == "grpo"]
    areas = [np.asarray(area.get_paths()[0].vertices) for area in panel.collections]
    highest = own.groupby("step")[branches.UNBOUNDED].mean().max()
    assert areas[0][:, 1].min() == 0 and areas[0][:, 1].max() == pytest.approx(highest)
    assert max(area[:, 1].max() for area in areas) == pytest.approx(1)


def test_a_panel_of_lines_keeps_the_main_arms_where_there_are_too_many():
    assert lead_arms(["a", "b"]) == ["a", "b"]
    assert lead_arms(list(ARMS)) == [arm for arm in ARMS if arm in LEAD_ARMS]
    others = [arm for arm in ARMS if arm not in LEAD_ARMS]
    assert lead_arms(others) == others[:8]


def test_the_name_of_a_map_s_cell_breaks_behind_an_underscore():
    assert wrapped("stale_lr0.00035_m32_noise0", 17) == "stale_lr0.00035_\nm32_noise0"
    assert wrapped("GRPO + dual clip", 10) == "GRPO +\ndual clip"


@pytest.mark.parametrize("name", get_args(StudyName))
def test_no_two_arms_in_a_panel_of_a_study_look_alike(name):
    configs = study_plan(name, Path("runs") / name).configs
    for setting in {config.setting for config in configs}:
        arms = lead_arms(sorted({c.arm for c in configs if c.setting == setting}, key=arm_key))
        assert len({str(line_style(arm)) for arm in arms}) == len(arms), (setting, arms)


@pytest.mark.parametrize("width", [WIDE, COLUMN])
@pytest.mark.parametrize("count", [2, 3, 4, 6, 8])
@styled
def test_a_legend_lies_inside_its_figure(width, count):
    figure = mpl.figure.Figure(figsize=(width, 3), layout="constrained")
    figure.subplots()
    legend(figure, [*ARMS][:count])
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1


def _measures(*rows):
    """Complete runs of `run_measures`, by setting, arm and seed, with other columns."""
    base = {"complete": True, "collapsed": False, "collapse_step": 12.0, "peak": 0.8, "steps": 20}
    return pd.DataFrame([base | row for row in rows])


def test_a_response_is_read_where_names_differ_in_their_last_number_and_x_grows():
    runs = [
        {"setting": setting, "arm": "grpo", "seed": seed, "num_layers": layers, "churn_early": 0.1}
        for setting, layers in (("noise-L2", 2), ("noise-L8", 8), ("mild-L2", 2), ("other", 4))
        for seed in range(2)
    ]
    families = response.DEPTH.families(_measures(*runs))
    assert set(families) == {"noise-LN"} and set(families["noise-LN"]["at"]) == {2.0, 8.0}
    assert not response.DEPTH.families(_measures(*runs[:2]))
    (axes,) = response.response(_measures(*runs), response.DEPTH).axes
    assert axes.get_title() == "noise-LN" and len(axes.collections[0].get_offsets()) == 4
    unknown = _measures(*({**run, "churn_early": np.nan} for run in runs))
    assert not response.DEPTH.families(unknown)


@pytest.mark.parametrize("arms", [("grpo", "grpo+replay"), ("grpo+replay",)])
def test_the_tolerance_of_arms_that_replay_is_drawn_where_no_other_has_run(arms):
    runs = [
        {"setting": f"s{noise}", "arm": arm, "seed": 1, "router_noise": noise, "final": 0.5,
         "learning_rate": 1e-3, "updates_per_rollout": 8,
         "routing_replay": "R3" if "replay" in arm else "disabled"}
        for noise in (0.1, 0.2, 0.3) for arm in arms if (arm, noise) != ("grpo", 0.3)
    ]  # fmt: skip
    steps = pd.DataFrame(
        {**{key: run[key] for key in ("setting", "arm", "seed")}, "step": 0,
         tolerance.KL: run["router_noise"], tolerance.ROUTERS: run["router_noise"]}
        for run in runs
    )  # fmt: skip
    kl, _ = tolerance.tolerance(steps, _measures(*runs)).axes
    assert {len(dots.get_offsets()) for dots in kl.collections} <= {2, 3}


def test_restarts_are_of_the_runs_that_collapsed():
    rows = [{"arm": "grpo", "seed": seed, "collapsed": seed < 2, "final": 0.1} for seed in range(3)]
    rows += [
        {"arm": arm, "seed": seed, "final": final}
        for arm, final in (("before-gspo", 0.9), ("after-same", 0.1))
        for seed in range(3)
    ]
    measures = _measures(*({"setting": "s"} | row for row in rows))
    again = restarts.restarted(measures)
    assert sorted(zip(again["when"], again["way"], again["seed"], strict=True)) == [
        ("after", "same", 0), ("after", "same", 1), ("before", "gspo", 0), ("before", "gspo", 1)
    ]  # fmt: skip
    before, after = restarts.restarts(measures).axes
    shown = [sum(len(dots.get_offsets()) for dots in axes.collections) for axes in (before, after)]
    assert shown == [2, 2]
    assert restarts.restarted(measures[measures["arm"] == "grpo"]).empty
