"""Analysis room: small-sample statistics over seeds (numpy only).

A run is one draw, the seed is the unit: nothing here treats steps or tokens as independent
samples. Everything is deterministic: resampling uses a generator with a fixed seed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
Statistic = Callable[[FloatArray], FloatArray]

LEVEL = 0.95  # coverage of every interval in the report
RESAMPLES = 10_000  # Monte Carlo error of a 2.5% quantile is then below 0.2% of the mass
RNG_SEED = 20250718  # fixed so that the same files give the same report
EXACT_SIGN_FLIPS = 14  # 2^14 assignments are enumerated; above that they are sampled
WILSON_Z = 1.959963984540054  # the 97.5% quantile of the normal distribution
# The 97.5% quantiles of Student's t with 1, 2, ... degrees of freedom.
STUDENT_T = (
    *(12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912),
    *(2.364624, 2.306004, 2.262157, 2.228139, 2.200985, 2.178813),
)


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A statistic with its interval: `low <= value <= high`; NaN bounds where n < 2."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, kw_only=True)
class PairedTest:
    """Differences b - a over common seeds: mean, Student's interval, sign-flip p value."""

    n: int
    difference: float
    low: float
    high: float
    p_value: float


def finite(values: ArrayLike) -> FloatArray:
    """The finite entries of `values` as a flat float64 array."""
    array = np.asarray(values, dtype=np.float64).ravel()
    return array[np.isfinite(array)]


def iqm(values: FloatArray) -> FloatArray:
    """Interquartile mean along the last axis: drop floor(n/4) at each end, mean of the rest.

    The definition of rliable (arXiv 2108.13264), scipy's `trim_mean(x, 0.25)`. With n < 4 nothing
    is dropped and it is the mean; with n = 5 it is the mean of the middle three.
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64), axis=-1)
    count = ordered.shape[-1]
    if count == 0:
        return np.full(ordered.shape[:-1], np.nan)
    cut = count // 4
    result: FloatArray = np.mean(ordered[..., cut : count - cut], axis=-1)
    return result


def mean(values: FloatArray) -> FloatArray:
    """Arithmetic mean along the last axis, the statistic of the paired differences."""
    result: FloatArray = np.mean(np.asarray(values, dtype=np.float64), axis=-1)
    return result


def bootstrap_interval(
    values: ArrayLike,
    statistic: Statistic = iqm,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    rng_seed: int = RNG_SEED,
) -> Interval:
    """Percentile bootstrap over seeds of `statistic`, which must reduce the last axis.

    Seeds are drawn with replacement, non-finite values are dropped first. The bounds are the
    (1-level)/2 and (1+level)/2 quantiles of the resampled statistic; n < 2 has no spread and gives
    NaN bounds. It describes an arm; verdicts rest on `student_interval`.

    Raises ValueError where `level` is not in (0, 1).
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must lie in (0, 1), got {level!r}: 0.95 is usual")
    array = finite(values)
    if len(array) == 0:
        return Interval(value=math.nan, low=math.nan, high=math.nan, n=0)
    value = float(statistic(array))
    if len(array) < 2:
        return Interval(value=value, low=math.nan, high=math.nan, n=len(array))
    generator = np.random.default_rng(rng_seed)
    resampled = statistic(array[generator.integers(0, len(array), size=(resamples, len(array)))])
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value=value, low=float(low), high=float(high), n=len(array))


def student_interval(values: ArrayLike) -> Interval:
    """Mean over seeds with Student's 95% interval, mean +- t s / sqrt(n), n - 1 degrees of freedom.

    Exact for normal values at any n, where a percentile bootstrap covers 83% at n = 5 and 89% at
    n = 8. Non-finite values are dropped; n < 2 gives NaN bounds.
    """
    array = finite(values)
    n = len(array)
    if n == 0:
        return Interval(value=math.nan, low=math.nan, high=math.nan, n=0)
    centre = float(array.mean())
    if n < 2:
        return Interval(value=centre, low=math.nan, high=math.nan, n=n)
    half = _student_t(n - 1) * float(array.std(ddof=1)) / math.sqrt(n)
    return Interval(value=centre, low=centre - half, high=centre + half, n=n)


def _student_t(freedom: int) -> float:
    """The 97.5% quantile; beyond the table by its expansion around the normal, error under 1e-4.

    Abramowitz and Stegun, 26.7.5.
    """
    if freedom <= len(STUDENT_T):
        return STUDENT_T[freedom - 1]
    z = WILSON_Z
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def sign_flip_p_value(differences: ArrayLike, *, rng_seed: int = RNG_SEED) -> float:
    """Two-sided p value of the paired sign-flip permutation test of "mean difference = 0".

    The share of sign assignments whose |mean| is at least the observed one: all 2^n of them up to
    n = 14 (exact, never below 2^(1-n)), else 20000 random ones plus the observed. NaN for n = 0.
    """
    values = finite(differences)
    if len(values) == 0:
        return math.nan
    observed = abs(values.mean())
    tolerance = 1e-12 * float(np.abs(values).max())  # sums of equal size differ in rounding
    if len(values) <= EXACT_SIGN_FLIPS:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(values))))
        return float(np.mean(np.abs((signs * values).mean(axis=1)) >= observed - tolerance))
    generator = np.random.default_rng(rng_seed)
    signs = generator.choice((1.0, -1.0), size=(20_000, len(values)))
    as_large = np.abs((signs * values).mean(axis=1)) >= observed - tolerance
    return float((as_large.sum() + 1) / (len(as_large) + 1))


def paired_test(a: ArrayLike, b: ArrayLike) -> PairedTest:
    """Test of b against a on the same seeds: `a[i]` and `b[i]` belong to seed i.

    Pairs with a non-finite member are dropped. The interval is Student's, of the mean difference.
    Raises ValueError where the two differ in length.
    """
    first = np.asarray(a, dtype=np.float64).ravel()
    second = np.asarray(b, dtype=np.float64).ravel()
    if len(first) != len(second):
        raise ValueError(
            f"a has {len(first)} values and b {len(second)}: a paired test needs the same seeds"
        )
    differences = finite(second - first)
    interval = student_interval(differences)
    return PairedTest(
        n=interval.n,
        difference=interval.value,
        low=interval.low,
        high=interval.high,
        p_value=sign_flip_p_value(differences),
    )


def wilson_interval(successes: int, n: int) -> Interval:
    """Fraction `successes / n` with its 95% Wilson score interval; NaN throughout for n = 0.

    centre = (p + z^2/2n) / (1 + z^2/n), half width = z sqrt(p(1-p)/n + z^2/4n^2) / (1 + z^2/n).
    Raises ValueError unless 0 <= successes <= n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes must lie in 0..{n}, got {successes}")
    if n == 0:
        return Interval(value=math.nan, low=math.nan, high=math.nan, n=0)
    share, z2 = successes / n, WILSON_Z**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = WILSON_Z * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return Interval(value=share, low=low, high=high, n=n)


def seeds_to_settle_fraction(share: float, threshold: float = 0.5, limit: int = 1000) -> int | None:
    """The smallest n whose Wilson interval around `share` leaves `threshold` outside.

    None where no n up to `limit` does: the share sits on the threshold.
    """
    for n in range(1, limit + 1):
        interval = wilson_interval(round(share * n), n)
        if interval.low > threshold or interval.high < threshold:
            return n
    return None
