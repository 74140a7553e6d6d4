"""Tests of analysis: collapse of hand-made reward curves, and the stability frontier."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_rl.analysis.data.collapse import outcome, smooth, smoothing_window, stability_frontier


def test_a_run_that_falls_and_stays_down_collapses_at_the_fall():
    reward = [0.8] * 24 + [0.1] * 24
    result = outcome(reward)
    # Trailing window of 4: (0.8 + 3 * 0.1) / 4 is the first mean under 0.4.
    assert result.collapsed and result.collapse_step == 26
    assert result.peak == pytest.approx(0.8)
    assert result.final == pytest.approx(0.1)
    assert result.drawdown == pytest.approx(0.875)


def test_a_run_that_recovers_has_not_collapsed():
    result = outcome([0.8] * 20 + [0.1] * 10 + [0.7] * 30)
    assert not result.collapsed and math.isnan(result.collapse_step)
    assert result.drawdown == pytest.approx(0.125)
    assert not result.unstable
    assert result.deepest_fall == pytest.approx(0.875), "the fall in between is told"


def test_a_second_fall_dates_the_collapse():
    result = outcome([0.8] * 12 + [0.1] * 12 + [0.7] * 12 + [0.1] * 12)
    assert result.collapsed and result.collapse_step > 36


def test_a_run_that_never_rises_and_never_falls_has_not_collapsed():
    assert not outcome([0.3] * 40).collapsed
    assert not outcome([0.0] * 40).collapsed
    assert outcome([0.0] * 40).drawdown == 0
    assert outcome([0.0] * 40).deepest_fall == 0


def test_a_run_that_sinks_from_its_first_step_collapses():
    assert outcome(np.linspace(0.3, 0.0, 60)).collapsed


def test_a_steady_rise_is_hardly_a_drawdown():
    result = outcome(np.linspace(0.3, 0.9, 60))
    assert result.drawdown < 0.02 and not result.unstable


def test_a_reward_that_is_not_a_number_counts_as_none():
    result = outcome([0.8] * 24 + [math.nan] * 24)
    assert result.collapsed and result.final == 0 and result.nonfinite_rewards == 24


def test_one_nan_in_a_good_run_is_no_collapse():
    assert not outcome([0.8] * 30 + [math.nan] + [0.8] * 30).collapsed


@pytest.mark.parametrize(("steps", "last"), [(7, 1), (20, 2), (40, 5), (64, 8)])
def test_the_final_reward_is_the_mean_of_the_last_eighth(steps, last):
    reward = np.linspace(0.0, 1.0, steps) ** 2
    assert outcome(reward).final == pytest.approx(reward[-last:].mean())


def test_times_are_step_numbers():
    result = outcome([0.8] * 24 + [0.1] * 24, np.arange(100, 148))
    assert result.collapse_step == 126 and 100 <= result.peak_step < 124


def test_an_empty_run_has_no_outcome():
    result = outcome([])
    assert result.steps == 0 and math.isnan(result.final) and not result.collapsed


def test_a_single_step_is_its_own_peak_and_final():
    result = outcome([0.4])
    assert (result.peak, result.final, result.collapsed) == (0.4, 0.4, False)


def test_smoothing_is_trailing_and_starts_with_what_there_is():
    assert smooth(range(1, 25))[:4].tolist() == [1, 1.5, 2.5, 3.5]
    assert smoothing_window(60) == 5 and smoothing_window(3) == 1


@given(st.lists(st.floats(0, 1), min_size=1, max_size=80), st.floats(0.1, 100))
def test_collapse_does_not_depend_on_the_unit_of_reward(reward, scale):
    one, other = outcome(reward), outcome([scale * value for value in reward])
    margin = min(abs(np.array(smooth(reward)) - one.peak / 2), default=1)
    if margin > 1e-9:  # a tie can round either way
        assert one.drawdown == pytest.approx(other.drawdown, abs=1e-6)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=80))
def test_a_collapsed_run_ends_under_half_its_peak(reward):
    result = outcome(reward)
    if result.collapsed:
        assert smooth(reward)[-1] < result.peak / 2
    assert 0 <= result.drawdown <= 1


def _runs(drawdowns, arm="grpo", seeds=(1,)):
    return pd.DataFrame(
        [
            {
                "arm": arm, "updates_per_rollout": 8, "router_noise": 0.0,
                "learning_rate": rate, "seed": seed, "drawdown": value,
            }
            for rate, value in drawdowns.items()
            for seed in seeds
        ]
    )  # fmt: skip


def test_the_frontier_is_the_largest_stable_rate():
    row = stability_frontier(_runs({1e-4: 0.0, 2e-4: 0.2, 4e-4: 0.21})).iloc[0]
    assert row["frontier"] == 2e-4 and not row["censored"] and not row["stable_beyond"]


def test_a_lucky_cell_beyond_an_unstable_one_does_not_move_the_frontier():
    row = stability_frontier(_runs({1e-4: 0.0, 2e-4: 0.5, 4e-4: 0.1})).iloc[0]
    assert row["frontier"] == 1e-4 and row["stable_beyond"]


def test_the_frontier_says_where_the_map_ends():
    assert stability_frontier(_runs({1e-4: 0.0, 2e-4: 0.1})).iloc[0]["censored"]
    assert math.isnan(stability_frontier(_runs({1e-4: 0.9, 2e-4: 0.9})).iloc[0]["frontier"])


def test_the_frontier_takes_the_median_seed_and_shows_the_range():
    runs = pd.concat(
        [
            _runs({1e-4: 0.0, 2e-4: 0.0, 4e-4: 0.9}, seeds=(1, 2)),
            _runs({1e-4: 0.0, 2e-4: 0.9, 4e-4: 0.9}, seeds=(3,)),
            _runs({1e-4: 0.9}, seeds=(4,)),
        ]
    )
    row = stability_frontier(runs).iloc[0]
    assert row["frontier"] == 2e-4
    assert (row["seed_low"], row["seed_high"], row["seeds"]) == (0.0, 2e-4, 3)
