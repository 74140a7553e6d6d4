"""What an audit means for training, in words. Every sentence has its numbers.

Two readings are told apart by KL (k3) on sampled tokens. Below what two engines of a dense model
differ by (metrics/published.py), replay has nothing to mend.
"""

import math

from moe_rl.audit.difference import Difference
from moe_rl.audit.ways import Kind
from moe_rl.metrics.published import DENSE_KL

WORTH = 0.5
"""Share of the KL that replay must remove to be called the cure."""
SURE = 2.0
"""Standard errors by which a KL must differ from a dense model's."""


def verdict(name: str, kind: Kind, found: Difference) -> str:
    """One sentence on a reading that differs by more than its batch's shape."""
    if found.not_finite == 1:
        return f"{name}: every log-prob is NaN or inf; this checkpoint does not run so."
    broken = ""
    if found.not_finite > 0:
        broken = f" {found.not_finite:.2%} of its log-probs are NaN or inf and left out."
    routers = _share(found.router_disagreement)
    kl, error = found.live.kl_k3, found.live.kl_k3_error
    measured = f"KL {kl:.2g}" + ("" if math.isnan(error) else f" (standard error {error:.1g})")
    start = f"{routers} of routers differ, {measured}"
    if kind == "trace":
        words = f"{routers} of routers differ, which alone moves this model by {measured}"
    elif math.isnan(error) and found.live.largest > 0:
        words = f"not settled: {start}, and one prompt has no standard error; give more prompts"
    elif abs(kl - DENSE_KL) <= SURE * error:
        words = (
            f"not settled: {start}, too near to the {DENSE_KL:.2g} that a dense model has between "
            "two engines; give more prompts"
        )
    elif found.router_disagreement == 0:
        words = f"no router differs, {measured}: there is nothing to replay"
        if kl >= DENSE_KL:
            words = f"no router differs, {measured}: this is arithmetic or weights, not routing"
    elif kl < DENSE_KL:
        words = (
            f"replay not needed: {start}, below the {DENSE_KL:.2g} that a dense model has between "
            "two engines"
        )
    elif math.isnan(found.removed):
        words = f"{start}; not read with equal routes"
    elif found.removed >= WORTH:
        words = f"replay needed: {start}, of which replay removes {found.removed:.0%}"
        assert found.replayed is not None
        if found.replayed.kl_k3 >= DENSE_KL:
            words += f" and leaves {found.replayed.kl_k3:.2g}, more than routing explains"
    else:
        words = (
            f"replay does not mend this: {start}, of which it removes "
            f"{max(found.removed, 0.0):.0%}; the rest is arithmetic or weights, not routing"
        )
    return f"{name}: {words}.{broken}"


def shape_verdict(rows: list[tuple[str, Difference]], what: str) -> str:
    """One sentence on all readings that differ in the order of sums alone."""
    if all(found.router_disagreement == 0 and found.live.largest == 0 for _, found in rows):
        return f"{what}: bit for bit the same."
    name, worst = max(rows, key=lambda row: row[1].live.kl_k3)
    words = f"at most KL {worst.live.kl_k3:.2g} and {_share(worst.router_disagreement)} of routers"
    if worst.live.kl_k3 < DENSE_KL:
        return f"{what}: {words} ({name})."
    words += f" ({name}), more than the {DENSE_KL:.2g} that a dense model has between two engines"
    if not math.isnan(worst.removed):
        words += f"; replay removes {max(worst.removed, 0.0):.0%} of it"
    return f"{what}: {words}."


def _share(value: float) -> str:
    """A share as a percentage that is not rounded to 0."""
    return f"{value:.1%}" if value >= 5e-4 or value == 0 else f"{value:.1e}"
