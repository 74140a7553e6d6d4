"""Tests of analysis: statistics over seeds."""

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_rl.analysis.data.stats import (
    bootstrap_interval,
    holm,
    iqm,
    paired_test,
    seeds_to_settle_fraction,
    separation,
    sign_flip_p_value,
    student_interval,
    wilson_interval,
)

FINITE = st.floats(-10, 10, allow_nan=False)


def test_iqm_ignores_one_outlier_of_five():
    assert float(iqm([0.8, 0.8, 0.8, 0.8, -1e6])) == pytest.approx(0.8)


@settings(max_examples=10, deadline=None)
@given(st.lists(FINITE, min_size=2, max_size=8))
def test_bootstrap_interval_stays_within_the_values_and_is_the_same_every_time(values):
    interval = bootstrap_interval(values)
    assert min(values) - 1e-9 <= interval.low <= interval.high <= max(values) + 1e-9
    assert interval == bootstrap_interval(values)


@pytest.mark.parametrize("interval", [bootstrap_interval, student_interval])
def test_an_interval_drops_nan_and_inf_and_needs_two(interval):
    one = interval([math.nan, 0.3, math.inf])
    assert (one.n, one.value) == (1, 0.3) and math.isnan(one.low)
    assert interval([]).n == 0 and math.isnan(interval([]).value)


@given(st.lists(st.integers(-20, 20).map(float), min_size=2, max_size=20))
def test_students_interval_agrees_with_scipys_t_test(values):
    interval = student_interval(values)
    if len(set(values)) > 1:
        theirs = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
        # Ours takes the quantile to six decimals.
        assert (interval.low, interval.high) == pytest.approx(tuple(theirs), rel=1e-6, abs=2e-5)
    else:
        assert interval.low == interval.high == values[0]


def test_sign_flip_reaches_its_floor_when_all_seeds_agree():
    assert sign_flip_p_value([0.1, 0.2, 0.3, 0.4, 0.5]) == 2 ** (1 - 5)


def test_sign_flips_are_all_enumerated():
    differences = np.random.default_rng(0).normal(0.3, 1.0, size=15)
    signs = np.array(np.meshgrid(*[[-1.0, 1.0]] * 15)).reshape(15, -1)
    exact = (abs(differences @ signs) >= abs(differences.sum()) - 1e-12).mean()
    assert sign_flip_p_value(differences) == exact  # fifteen seeds are enumerated


def test_paired_test_changes_sign_with_its_arguments():
    a, b = [0.1, 0.2, 0.3], [0.5, 0.5, 0.9]
    one, other = paired_test(a, b), paired_test(b, a)
    assert one.difference == pytest.approx(-other.difference)
    assert one.low == pytest.approx(-other.high)
    assert one.p_value == other.p_value


def test_paired_test_drops_pairs_with_a_gap():
    assert paired_test([0.1, math.nan, 0.2], [0.3, 0.4, 0.5]).n == 2


@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_bounds_solve_the_score_equation(case):
    k, n = case
    interval, z = wilson_interval(k, n), scipy.stats.norm.ppf(0.975)
    for bound in {interval.low, interval.high} - {0.0, 1.0}:
        error = math.sqrt(bound * (1 - bound) / n)
        assert abs(k / n - bound) == pytest.approx(z * error, abs=1e-9)


@given(st.floats(0, 1))
def test_the_seeds_that_settle_a_fraction_are_the_fewest(share):
    def settled(n):
        interval = wilson_interval(round(share * n), n)
        return interval.low > 0.5 or interval.high < 0.5

    needed = seeds_to_settle_fraction(share, limit=60)
    assert needed == next((n for n in range(1, 61) if settled(n)), None)


def test_four_unanimous_seeds_settle_a_fraction():
    assert seeds_to_settle_fraction(1.0) == seeds_to_settle_fraction(0.0) == 4
    assert seeds_to_settle_fraction(0.5) is None


@given(st.lists(st.floats(1e-6, 1), min_size=1, max_size=12))
def test_holm_rejects_what_its_step_down_procedure_rejects(p_values):
    corrected = holm(p_values)
    for alpha in (0.01, 0.05, 0.3):
        rejected, left = set(), sorted(range(len(p_values)), key=lambda i: p_values[i])
        while left and p_values[left[0]] * len(left) <= alpha:
            rejected.add(left.pop(0))
        assert {i for i, p in enumerate(corrected) if p <= alpha} == rejected


def test_one_test_needs_no_correction():
    assert holm([0.03]).tolist() == [0.03] and holm([]).size == 0
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


@given(*[st.lists(st.integers(0, 5), min_size=1, max_size=8)] * 2)
def test_a_separation_is_the_chance_that_one_is_above_the_other(one, two):
    pairs = [(a > b) + 0.5 * (a == b) for a in one for b in two]
    assert separation(one, two) == pytest.approx(sum(pairs) / len(pairs))
    assert separation(two, one) == pytest.approx(1 - separation(one, two))
    assert math.isnan(separation([], two))
