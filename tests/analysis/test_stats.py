"""Tests of the analysis room: statistics over seeds."""

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_rl.analysis.data.stats import (
    bootstrap_interval,
    iqm,
    mean,
    paired_test,
    seeds_to_settle_fraction,
    sign_flip_p_value,
    student_interval,
    wilson_interval,
)

FINITE = st.floats(-10, 10, allow_nan=False)


@given(st.lists(FINITE, min_size=1, max_size=30))
def test_iqm_is_scipys_trimmed_mean(values):
    assert float(iqm(np.array(values))) == pytest.approx(
        scipy.stats.trim_mean(values, 0.25), abs=1e-9
    )


def test_iqm_of_nothing_is_nan():
    assert math.isnan(float(iqm(np.array([]))))


def test_iqm_ignores_one_outlier_of_five():
    assert float(iqm(np.array([0.8, 0.8, 0.8, 0.8, -1e6]))) == pytest.approx(0.8)


def test_bootstrap_agrees_with_scipy():
    values = np.random.default_rng(1).normal(0.5, 0.2, size=12)
    ours = bootstrap_interval(values, mean)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(2)
    ).confidence_interval
    assert ours.low == pytest.approx(theirs.low, abs=0.01)
    assert ours.high == pytest.approx(theirs.high, abs=0.01)


def test_bootstrap_is_the_same_every_time():
    values = [0.1, 0.5, 0.4, 0.9]
    assert bootstrap_interval(values) == bootstrap_interval(values)


@settings(max_examples=25, deadline=None)
@given(st.lists(FINITE, min_size=2, max_size=8))
def test_bootstrap_interval_stays_within_the_values(values):
    interval = bootstrap_interval(values, resamples=200)
    assert min(values) - 1e-9 <= interval.low <= interval.high <= max(values) + 1e-9


def test_bootstrap_drops_what_is_not_finite_and_needs_two():
    assert bootstrap_interval([math.nan, 0.3, math.inf]).n == 1
    assert math.isnan(bootstrap_interval([0.3]).low)
    assert bootstrap_interval([]).n == 0


@given(st.lists(st.integers(-20, 20).map(float), min_size=2, max_size=12))
def test_students_interval_agrees_with_scipy(values):
    interval = student_interval(values)
    error = scipy.stats.sem(values)
    low, high = (
        scipy.stats.t.interval(0.95, len(values) - 1, np.mean(values), error)
        if error
        else (np.mean(values), np.mean(values))
    )
    assert interval.low == pytest.approx(low, rel=1e-3, abs=1e-6)
    assert interval.high == pytest.approx(high, rel=1e-3, abs=1e-6)


def test_students_quantiles_go_on_behind_the_table():
    for n in range(2, 60):
        values = np.arange(n, dtype=float)
        theirs = scipy.stats.t.ppf(0.975, n - 1) * scipy.stats.sem(values)
        assert student_interval(values).high - values.mean() == pytest.approx(theirs, rel=1e-4)
    assert np.isnan(student_interval([1.0]).low) and student_interval([]).n == 0


def test_bootstrap_names_bad_arguments():
    with pytest.raises(ValueError, match=r"level must lie in \(0, 1\), got 95"):
        bootstrap_interval([1.0, 2.0], level=95)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(-20, 20).map(float), min_size=2, max_size=7))
def test_sign_flip_agrees_with_scipys_exact_permutation_test(differences):
    theirs = scipy.stats.permutation_test(
        (np.array(differences),), np.mean, permutation_type="samples", n_resamples=np.inf
    ).pvalue
    assert sign_flip_p_value(differences) == pytest.approx(theirs)


def test_sign_flip_reaches_its_floor_when_all_seeds_agree():
    assert sign_flip_p_value([0.1, 0.2, 0.3, 0.4, 0.5]) == 2 ** (1 - 5)


def test_sampled_sign_flips_agree_with_exact_ones():
    differences = np.random.default_rng(0).normal(0.3, 1.0, size=15)
    exact = scipy.stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=np.inf
    ).pvalue
    assert sign_flip_p_value(differences) == pytest.approx(exact, abs=0.02)


def test_paired_test_changes_sign_with_its_arguments():
    a, b = [0.1, 0.2, 0.3], [0.5, 0.5, 0.9]
    one, other = paired_test(a, b), paired_test(b, a)
    assert one.difference == pytest.approx(-other.difference)
    assert one.low == pytest.approx(-other.high, abs=0.02)
    assert one.p_value == other.p_value


def test_paired_test_drops_pairs_with_a_gap_and_refuses_unequal_lengths():
    assert paired_test([0.1, math.nan, 0.2], [0.3, 0.4, 0.5]).n == 2
    with pytest.raises(ValueError, match="a has 2 values and b 1"):
        paired_test([0.1, 0.2], [0.3])


@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_scipys(case):
    k, n = case
    theirs = scipy.stats.binomtest(k, n).proportion_ci(method="wilson")
    ours = wilson_interval(k, n)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


def test_wilson_refuses_more_successes_than_trials():
    with pytest.raises(ValueError, match=r"0\.\.2, got 3"):
        wilson_interval(3, 2)


def test_four_unanimous_seeds_settle_a_fraction_and_three_do_not():
    assert seeds_to_settle_fraction(1.0) == 4
    assert seeds_to_settle_fraction(0.0) == 4
    assert seeds_to_settle_fraction(0.5) is None
