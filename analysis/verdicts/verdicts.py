"""From an interval and a rule to a verdict.

A rule is a region of the number line in which a claim holds. The verdict is

    reproduced       the whole 95% interval lies inside the region
    not reproduced   the whole interval lies outside
    inconclusive     it straddles an edge, there are too few seeds, or nothing was measured

Below MIN_SEEDS = 5 nothing is settled. Intervals of means are Student's, those of fractions
Wilson's. Neither is exact for what runs do: where one seed in seven collapses and the others agree,
Student's 95% covers 56% at n = 5 and 73% at n = 8, so that every claim of "no loss" also counts
collapses; and a coin would clear Wilson's bound of 1/2 on one side with probability 3.1% at n = 5
and 3.5% at n = 8, where 2.5% is nominal. Verdicts are not corrected for their number.
"""

import math
from dataclasses import dataclass

from moe_rl.analysis.data.stats import Interval, seeds_to_settle_fraction, wilson_interval

REPRODUCED = "reproduced"
NOT_REPRODUCED = "not reproduced"
INCONCLUSIVE = "inconclusive"

NOT_MEASURED = Interval()
# What the reason of a verdict says where the question does not arise.
NOT_JUDGED = "not judged"  # at its beginning
STABLE = "is stable here"
MIN_SEEDS = 5
MAJORITY = 0.5  # of seeds: above it an arm "does" something


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What we measured for one claim: our number, the verdict and why."""

    verdict: str
    reason: str
    ours: str = "not measured"
    interval: Interval = NOT_MEASURED


def judge_interval(interval: Interval, low: float = -math.inf, high: float = math.inf) -> Judgement:
    """Verdict on "the quantity lies in [low, high]" from an interval over seeds."""
    region = _region(low, high)
    if interval.n == 0:
        verdict, reason = INCONCLUSIVE, "not measured"
    elif interval.n < MIN_SEEDS:
        verdict = INCONCLUSIVE
        reason = f"{seeds(interval.n)}; an interval over seeds needs {MIN_SEEDS}"
    elif low <= interval.low and interval.high <= high:
        verdict, reason = REPRODUCED, f"interval {region}"
    elif interval.high < low or interval.low > high:
        verdict, reason = NOT_REPRODUCED, f"interval not {region}"
    else:
        needed = _seeds_to_clear(interval, low, high)
        more = f"; about {needed} seeds would clear it at this spread" if needed else ""
        verdict, reason = INCONCLUSIVE, f"interval straddles the rule ({region}){more}"
    return Judgement(verdict=verdict, reason=reason, interval=interval)


def judge_fraction(k: int, n: int, *, majority: bool, what: str) -> Judgement:
    """Verdict on "most seeds do" (majority) or "most seeds do not" from k of n seeds.

    Reproduced when the Wilson interval lies wholly above 1/2 (below 1/2 for `majority=False`),
    not reproduced when wholly on the other side. `what` names the event, for the reason.
    """
    interval = wilson_interval(k, n)
    counted = f"{what} in {k} of {seeds(n)}"
    if n == 0:
        verdict, reason = INCONCLUSIVE, "not measured"
    elif n < MIN_SEEDS:
        verdict, reason = INCONCLUSIVE, f"{counted}; a share of seeds needs {MIN_SEEDS}"
    elif interval.low > MAJORITY or interval.high < MAJORITY:
        verdict = REPRODUCED if (interval.low > MAJORITY) == majority else NOT_REPRODUCED
        reason = counted
    else:
        needed = seeds_to_settle_fraction(k / n)
        more = f"; {needed} seeds at this share would settle it" if needed else ""
        verdict, reason = INCONCLUSIVE, f"{counted}, Wilson interval straddles one half{more}"
    return Judgement(verdict=verdict, reason=reason, interval=interval)


def both(first: Judgement, second: Judgement) -> tuple[str, str]:
    """Verdict and reason of "first and second": one failed part fails the whole."""
    findings = (first, second)
    for verdict in (NOT_REPRODUCED, INCONCLUSIVE):
        reasons = [finding.reason for finding in findings if finding.verdict == verdict]
        if reasons:
            return verdict, "; ".join(dict.fromkeys(reasons))
    return REPRODUCED, "; ".join(finding.reason for finding in findings)


def _seeds_to_clear(interval: Interval, low: float, high: float) -> int | None:
    """n at which an interval shrinking as 1/sqrt(n) around this value would clear the nearest edge.

    None where the value sits (nearly) on an edge: no n worth naming can be promised.
    """
    distance = min(abs(interval.value - edge) for edge in (low, high) if math.isfinite(edge))
    half = max(interval.high - interval.value, interval.value - interval.low)
    if distance < half / 30:  # 900 times the seeds
        return None
    needed = math.ceil(interval.n * (half / distance) ** 2)
    return max(needed, interval.n + 1)


def _region(low: float, high: float) -> str:
    if math.isinf(low):
        return f"below {high:g}"
    if math.isinf(high):
        return f"above {low:g}"
    return f"within {low:g} to {high:g}"


def seeds(n: int) -> str:
    """A number of seeds in words."""
    return f"{n} seed" if n == 1 else f"{n} seeds"
