"""What stands out in an inspection, in words: each sentence has its number and what to do.

A rule looks at one number; it speaks where the number is known, and calls it by its level: good,
look, wrong.
"""

import math
from typing import Literal, NamedTuple

from moe_rl.metrics.branches import HIGH
from moe_rl.metrics.published import DENSE_KL, MOE_KL
from moe_rl.recorded.inspection import Inspection, Pair

Level = Literal["wrong", "look", "good"]
LEVELS: tuple[Level, ...] = ("wrong", "look", "good")

BROKEN_KL = 0.1
"""Nats a token: no engine of equal weights is that far (SGLang's blog: MoE 1e-3 to 1e-1)."""
ERRORS = 4.0
"""Standard errors beyond a bound that are no chance, of many sequences."""
MANY = 16
"""Sequences: of fewer a standard error is too uncertain to call a mean wrong by (with 4 an honest
one is 4 standard errors off in 3 of 100 batches, with 16 in none of 200)."""
UNBOUNDED = 0.05
"""Share of the gradient's mass in the unbounded branch that is worth a bound."""


class Finding(NamedTuple):
    """One thing that stands out."""

    level: Level
    words: str


def findings(found: Inspection) -> list[Finding]:
    """All findings, the worst first."""
    rules = (_numbers, _sampling, _recomputed, _engine, _branch, _routes)
    said = [one for rule in rules for one in rule(found)]
    return sorted(said, key=lambda one: LEVELS.index(one.level))


def _numbers(found: Inspection) -> list[Finding]:
    return [
        Finding(
            "wrong",
            f"{name} is NaN, inf or null at {count} of {found.tokens} response tokens, which are "
            "left out; a run with such a batch trains on noise",
        )
        for name, count in found.not_finite.items()
    ]


def _sampling(found: Inspection) -> list[Finding]:
    """Over the policy that sampled, the mean of w is 1 and its tail lies below 1/t."""
    said = []
    for pair in found.pairs:
        if pair.denominator != "rollout_logprobs" or pair.numerator == "logprobs":
            continue
        off = (pair.mean - 1) / pair.mean_error if pair.mean_error > 0 else 0.0
        if abs(off) > ERRORS:
            said.append(
                Finding(
                    "wrong" if pair.sequences >= MANY else "look",
                    f"the mean of trainer over engine is {pair.mean:.3g}, {abs(off):.0f} standard "
                    "errors from 1, which it is for log-probs of the policy that sampled: look at "
                    "temperature, top-p, or the version of the weights",
                )
            )
        broken = _beyond_bound(pair)
        if broken is not None:
            t, share = broken
            said.append(
                Finding(
                    "wrong",
                    f"{share:.2%} of tokens have trainer over engine above {t:g}, and at most "
                    f"{1 / t:.2%} can if the engine's log-probs are those that it sampled from",
                )
            )
    return said


def _recomputed(found: Inspection) -> list[Finding]:
    """Over a recomputed pass nothing holds the mean of w at 1."""
    pair = next((pair for pair in found.pairs if pair.denominator == "old_logprobs"), None)
    if pair is None or not pair.mean_error > 0 or pair.mean - 1 < ERRORS * pair.mean_error:
        return []
    words = (
        f"the mean of policy over the trainer's own old log-probs is {pair.mean:.3g}, its largest "
        f"{pair.largest:.3g}: a recomputed denominator is too small for tokens that were sampled "
        "under other routes; divide by the engine's log-probs, or replay its routes"
    )
    return [Finding("look", words)]


def _beyond_bound(pair: Pair) -> tuple[float, float] | None:
    """The first t at which P(w > t) is above 1/t by more than chance."""
    for t, share in pair.survival:
        error = math.sqrt(max(share * (1 - share), 1e-12) / pair.tokens)
        if share > 1 / t + ERRORS * error:
            return t, share
    return None


def _engine(found: Inspection) -> list[Finding]:
    kl = found.metrics.get("mismatch/kl_k3", math.nan)
    far = found.metrics.get("mismatch/extreme_2", math.nan)
    if math.isnan(kl):
        return []
    start = f"KL (k3) between engine and trainer is {kl:.2g} nats a token, F(2) {far:.2%}"
    if kl == 0:
        return [Finding("look", f"{start}: engine and trainer log-probs are the same numbers")]
    if kl > BROKEN_KL:
        words = f"{start}: no rounding does that; look at weights, tokens, temperature and routes"
        return [Finding("wrong", words)]
    if kl > MOE_KL:
        words = f"{start}: more than the {MOE_KL:.1e} that the R3 paper calls the MoE's problem"
        return [Finding("look", words)]
    if kl > DENSE_KL:
        return [Finding("look", f"{start}: above the {DENSE_KL:.1e} of a dense model (R3 paper)")]
    return [Finding("good", f"{start}: below the {DENSE_KL:.1e} of a dense model (R3 paper)")]


def _branch(found: Inspection) -> list[Finding]:
    share = found.metrics.get("branch/negative_above", math.nan)
    if math.isnan(share):
        return []
    largest = found.metrics.get("branch/largest_token", math.nan)
    whose = "in the log" if found.history else "under GRPO's surrogate without dual clip"
    start = (
        f"{whose} {share:.1%} of the gradient's mass is in A < 0, w > {1 + HIGH:g}, which that "
        f"surrogate does not bound; the largest token has {largest:.1%} of all"
    )
    if share > UNBOUNDED:
        words = f"{start}: bound it (dual clip, a mask), or divide by the engine's log-probs"
        return [Finding("look", words)]
    return [Finding("good", start)]


def _routes(found: Inspection) -> list[Finding]:
    said = [
        Finding("wrong", f"routes, law {law.check}: {law.reason}")
        for law in found.laws
        if law.passed is False
    ]
    coverage = found.metrics.get("replay/coverage", math.nan)
    if coverage < 1:
        words = f"{1 - coverage:.2%} of response (token, layer) pairs have no record to replay"
        said.append(Finding("look", words))
    differ = found.metrics.get("mismatch/router_disagreement", math.nan)
    if not math.isnan(differ):
        slots = found.metrics.get("mismatch/churn", math.nan)
        of_slots = "" if math.isnan(slots) else f" and {slots:.1%} of expert slots"
        words = (
            f"{differ:.1%} of routers{of_slots} differ between engine and trainer (R3 paper: 10% "
            "of routers)"
        )
        said.append(Finding("look" if differ > 0.01 else "good", words))
    if found.best_shift:
        where = "earlier" if found.best_shift < 0 else "later"
        words = (
            f"the engine's routes fit the trainer's one position {where}, at twice as many routers "
            "or more: one of the two is recorded where a token is read, the other where it is "
            "predicted"
        )
        said.append(Finding("wrong", words))
    mixed = found.metrics.get("rollout/mixed_versions", 0.0)
    if mixed > 0:
        words = f"{mixed:.1%} of sequences were sampled by more than one version of the weights"
        said.append(Finding("look", f"{words}: routes of the older ones are not the old policy's"))
    return said
