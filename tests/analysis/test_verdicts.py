"""Tests of analysis: from interval and rule to verdict, on both sides of every edge."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_rl.analysis.data.stats import Interval
from moe_rl.analysis.verdicts.verdicts import (
    INCONCLUSIVE,
    MIN_SEEDS,
    NOT_REPRODUCED,
    REPRODUCED,
    Judgement,
    both,
    judge_fraction,
    judge_interval,
)


def _interval(low, high, n=MIN_SEEDS):
    return Interval(value=(low + high) / 2, low=low, high=high, n=n)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.06, 0.19, REPRODUCED),
        (0.05, 0.20, REPRODUCED),
        (0.04, 0.10, INCONCLUSIVE),
        (0.10, 0.21, INCONCLUSIVE),
        (0.01, 0.30, INCONCLUSIVE),
        (0.01, 0.049, NOT_REPRODUCED),
        (0.201, 0.4, NOT_REPRODUCED),
    ],
)
def test_an_interval_is_judged_by_where_it_lies(low, high, verdict):
    assert judge_interval(_interval(low, high), low=0.05, high=0.20).verdict == verdict


@given(st.floats(-1, 1), st.floats(0.001, 1), st.floats(-1, 1))
def test_flipping_the_data_flips_the_verdict(centre, half, edge):
    flipped = {REPRODUCED: NOT_REPRODUCED, NOT_REPRODUCED: REPRODUCED, INCONCLUSIVE: INCONCLUSIVE}
    one = judge_interval(_interval(centre - half, centre + half), low=edge)
    other = judge_interval(_interval(-centre - half, -centre + half), low=-edge)
    if edge not in (centre - half, centre + half):
        assert other.verdict == flipped[one.verdict]


@pytest.mark.parametrize("n", range(1, MIN_SEEDS))
def test_few_seeds_settle_nothing_and_the_needed_number_is_named(n):
    finding = judge_interval(_interval(0.5, 0.6, n), low=0.0)
    assert finding.verdict == INCONCLUSIVE and f"needs {MIN_SEEDS}" in finding.reason


def test_a_straddling_interval_says_how_many_seeds_would_clear_it():
    # Half width 0.15 around 0.1 must shrink to 0.1: 5 * 1.5^2 = 11.25 seeds.
    finding = judge_interval(_interval(-0.05, 0.25), low=0.0)
    assert "about 12 seeds" in finding.reason
    assert "seeds would" not in judge_interval(_interval(-0.2, 0.2), low=0.0).reason
    # Its bound on the edge itself: one more seed at least.
    assert "about 6 seeds" in judge_interval(_interval(-1e-9, 0.2), low=0.0).reason
    # A quarter of the half width from the edge: sixteen times the seeds.
    assert "about 80 seeds" in judge_interval(_interval(-0.75, 1.25), low=0.0).reason


def test_nothing_measured_is_inconclusive():
    nothing = Judgement(verdict=INCONCLUSIVE, reason="not measured")
    assert judge_interval(Interval(), low=0.0) == nothing


@pytest.mark.parametrize(
    ("k", "n", "verdict"),
    [
        (5, 5, REPRODUCED),
        (4, 4, INCONCLUSIVE),
        (3, 3, INCONCLUSIVE),
        (4, 5, INCONCLUSIVE),
        (1, 5, INCONCLUSIVE),
        (0, 5, NOT_REPRODUCED),
        (0, 4, INCONCLUSIVE),
        (7, 8, REPRODUCED),
        (6, 8, INCONCLUSIVE),
        (9, 10, REPRODUCED),
        (0, 0, INCONCLUSIVE),
    ],
)
def test_a_majority_is_judged_by_its_wilson_interval(k, n, verdict):
    assert judge_fraction(k, n, majority=True, what="grpo collapsed").verdict == verdict


@given(st.integers(1, 30).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_most_do_and_most_do_not_are_opposites(case):
    k, n = case
    do = judge_fraction(k, n, majority=True, what="x").verdict
    do_not = judge_fraction(n - k, n, majority=False, what="x").verdict
    assert do == do_not


def test_a_small_fraction_names_the_seeds_it_needs():
    finding = judge_fraction(2, 2, majority=True, what="grpo collapsed")
    assert finding.reason.startswith("grpo collapsed in 2 of 2 seeds")
    assert finding.reason.endswith("a share of seeds needs 5")
    more = judge_fraction(4, 5, majority=True, what="grpo collapsed")
    assert "seeds at this share would settle it" in more.reason


def test_one_failed_part_fails_the_whole():
    good, bad = (Judgement(verdict=v, reason=v) for v in (REPRODUCED, NOT_REPRODUCED))
    assert both(good, good)[0] == REPRODUCED
    assert both(good, bad) == (NOT_REPRODUCED, NOT_REPRODUCED)
    unsettled = Judgement(verdict=INCONCLUSIVE, reason="few")
    assert both(good, unsettled) == (INCONCLUSIVE, "few")
    assert both(bad, unsettled)[0] == NOT_REPRODUCED
