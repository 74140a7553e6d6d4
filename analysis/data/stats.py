"""Small-sample statistics over seeds, by `scipy.stats`.

A run is one draw, the seed is the unit: nothing here treats steps or tokens as independent
samples. Everything is deterministic: resampling uses a generator with a fixed seed.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

LEVEL = 0.95  # coverage of every interval in the report
RESAMPLES = 10_000  # Monte Carlo error of a 2.5% quantile is then below 0.2% of the mass
RNG_SEED = 20250718  # fixed so that the same files give the same report
EXACT_SIGN_FLIPS = 16  # 2^16 assignments are enumerated; above that as many are sampled


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A statistic with its interval: `low <= value <= high`; NaN bounds where n < 2."""

    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    n: int = 0


@dataclass(frozen=True, kw_only=True)
class PairedTest:
    """Differences b - a over common seeds: mean, Student's interval, sign-flip p value.

    `wins` counts the seeds in which b is above a.
    """

    n: int
    difference: float
    low: float
    high: float
    wins: int
    p_value: float


def finite(values: ArrayLike) -> NDArray[np.float64]:
    """The finite entries of `values` as a flat float64 array."""
    array = np.asarray(values, dtype=np.float64).ravel()
    return array[np.isfinite(array)]


def iqm(values: ArrayLike, axis: int = -1) -> NDArray[np.float64]:
    """Interquartile mean: drop floor(n/4) at each end, mean of the rest.

    The definition of rliable (arXiv 2108.13264). With n < 4 nothing is dropped and it is the mean;
    with n = 5 it is the mean of the middle three.
    """
    return np.asarray(stats.trim_mean(values, 0.25, axis=axis))


def bootstrap_interval(values: ArrayLike) -> Interval:
    """Interquartile mean over seeds with its 95% percentile bootstrap interval.

    Seeds are drawn with replacement, NaN and inf are dropped first; n < 2 has no spread and gives
    NaN bounds. It describes an arm; verdicts rest on `student_interval`.
    """
    array = finite(values)
    if len(array) < 2:
        return Interval(value=float(array[0]), n=1) if len(array) else Interval()
    low, high = stats.bootstrap(
        (array,),
        iqm,
        n_resamples=RESAMPLES,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(RNG_SEED),
    ).confidence_interval
    return Interval(value=float(iqm(array)), low=float(low), high=float(high), n=len(array))


def student_interval(values: ArrayLike) -> Interval:
    """Mean over seeds with Student's 95% interval, mean +- t s / sqrt(n), n - 1 degrees of freedom.

    Exact for normal values at any n, where a percentile bootstrap covers 83% at n = 5 and 89% at
    n = 8. NaN and inf are dropped; n < 2 gives NaN bounds.
    """
    array = finite(values)
    n = len(array)
    if n < 2:
        return Interval(value=float(array[0]), n=1) if n else Interval()
    # Six decimals, as in printed tables of t: the committed studies were judged with those.
    t = round(float(stats.t.ppf((1 + LEVEL) / 2, n - 1)), 6)
    centre, half = float(array.mean()), t * float(array.std(ddof=1)) / math.sqrt(n)
    return Interval(value=centre, low=centre - half, high=centre + half, n=n)


def sign_flip_p_value(differences: ArrayLike) -> float:
    """Two-sided p value of the paired sign-flip permutation test of "mean difference = 0".

    All 2^n sign assignments up to n = `EXACT_SIGN_FLIPS` (exact, never below 2^(1-n)), else as many
    random ones as there are at that n. NaN for n = 0.
    """
    values = finite(differences)
    if len(values) < 2:
        return 1.0 if len(values) else math.nan
    test = stats.permutation_test(
        (values,),
        np.mean,
        permutation_type="samples",
        n_resamples=2**EXACT_SIGN_FLIPS,
        rng=np.random.default_rng(RNG_SEED),
    )
    return float(test.pvalue)


def paired_test(a: ArrayLike, b: ArrayLike) -> PairedTest:
    """Test of b against a on the same seeds: `a[i]` and `b[i]` belong to seed i.

    Pairs with a NaN or inf are dropped. The interval is Student's, of the mean difference.
    """
    differences = finite(np.subtract(b, a, dtype=np.float64))
    interval = student_interval(differences)
    return PairedTest(
        n=interval.n,
        difference=interval.value,
        low=interval.low,
        high=interval.high,
        wins=int((differences > 0).sum()),
        p_value=sign_flip_p_value(differences),
    )


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """The p values of a family of m tests after Holm's step-down correction, in their order.

        p_holm(i) = min(1, max over j <= i of (m - j + 1) p(j)),  p(1) <= p(2) <= ... <= p(m)

    Rejecting where it is at most alpha keeps the chance of a single false rejection below alpha,
    however the tests depend on each other. Source: Holm 1979, Scandinavian J. of Statistics 6.
    """
    values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    scaled = values[order] * np.arange(len(values), 0, -1)
    corrected = np.empty_like(values)
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(scaled))
    return corrected


def separation(event: ArrayLike, other: ArrayLike) -> float:
    """AUC: chance that a value of `event` is above one of `other`, ties count half; NaN if empty.

    The Mann-Whitney statistic U / (n m).
    """
    one, two = (np.asarray(values, dtype=np.float64) for values in (event, other))
    above, below = one[:, None] > two[None, :], one[:, None] < two[None, :]
    return float((above.mean() - below.mean() + 1) / 2) if above.size else math.nan


def wilson_interval(successes: int, n: int) -> Interval:
    """Fraction `successes / n` with its 95% Wilson score interval; NaN throughout for n = 0."""
    if n == 0:
        return Interval()
    low, high = stats.binomtest(successes, n).proportion_ci(LEVEL, method="wilson")
    return Interval(value=successes / n, low=float(low), high=float(high), n=n)


def seeds_to_settle_fraction(share: float, limit: int = 1000) -> int | None:
    """The smallest n whose Wilson interval around `share` leaves one half outside.

    It does where |p - 1/2| > z / (2 sqrt(n)), with p the fraction of n seeds nearest to `share`.
    None where no n up to `limit` does: the share sits on one half.
    """
    n = np.arange(1, limit + 1)
    fractions = np.round(share * n) / n
    outside = np.abs(fractions - 0.5) > stats.norm.ppf((1 + LEVEL) / 2) / (2 * np.sqrt(n))
    return int(n[outside][0]) if outside.any() else None
