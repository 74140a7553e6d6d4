"""The numbers of a recorded batch, by the names that our own runs log them under.

Pairs of log-probs are compared over response tokens that are finite in both. Where a pair's
denominator is the engine that sampled, E[w] = 1 and P(w > t) <= 1/t for every policy that has not
learnt from these very tokens: what breaks that is the record, not the policy.
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe_rl.losses import aggregate, make_inputs
from moe_rl.losses.grpo import grpo_loss
from moe_rl.metrics.branches import branch_shares
from moe_rl.metrics.ratios import mismatch_statistics, ratio_statistics, ratio_tail
from moe_rl.recorded.batch import LOGPROBS, RecordedBatch
from moe_rl.replay_check.check_trace import Record, check_trace
from moe_rl.replay_check.claims import LawResult
from moe_rl.routing import statistics
from moe_rl.routing.routed_experts import NO_RECORD

SCHEMA = 1
TAUS = (1.1, 1.2, 1.5, 2.0, 3.0, 5.0, 10.0, 100.0)
TAIL = (1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0, 1000.0)
POINTS = 4000
"""Tokens that the scatter shows at most."""
PAIRS = (
    ("old_logprobs", "rollout_logprobs", "trainer before the updates / engine"),
    ("logprobs", "rollout_logprobs", "policy / engine"),
    ("logprobs", "old_logprobs", "policy / trainer before the updates"),
)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """w = exp(numerator - denominator) over response tokens."""

    numerator: str
    """Field of the batch."""
    denominator: str
    """Field of the batch."""
    name: str
    """Both in words, as in `PAIRS`."""
    tokens: int
    """Response tokens with finite values of both."""
    sequences: int
    """With such a token."""
    mean: float
    """Mean of w."""
    mean_error: float
    """Its standard error over sequences."""
    survival: list[tuple[float, float]]
    """t and P(w > t), for t in TAIL."""
    extreme: list[tuple[float, float]]
    """tau and F(tau), share of tokens with max(w, 1/w) > tau, for tau in TAUS."""
    largest: float
    """Largest w."""


@dataclass(kw_only=True)
class Inspection:
    """What was measured; `to_json` of it is what inspection.json holds."""

    source: str
    """Whose batch it is: verl, prime-rl, an engine."""
    sequences: int
    tokens: int
    """Response tokens."""
    holds: list[str]
    """Fields that the batch has."""
    notes: list[str]
    """Sentences on what was left out or taken for granted while reading."""
    not_finite: dict[str, int] = field(default_factory=dict)
    """Response tokens whose value is NaN or inf, by field."""
    metrics: dict[str, float] = field(default_factory=dict)
    """By our names."""
    pairs: list[Pair] = field(default_factory=list)
    by_layer: list[tuple[float, float]] = field(default_factory=list)
    """Churn and router disagreement of each layer, engine against trainer."""
    best_shift: int = 0
    """Positions by which the engine's routes have to be moved to fit the trainer's; 0: none."""
    laws: list[LawResult] = field(default_factory=list)
    """Of the engine's routes, see `moe-rl check-replay`."""
    scatter: list[tuple[float, float]] = field(default_factory=list)
    """Probability by the engine and by the trainer, of some tokens."""
    history: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    """Of a log: step and value of each metric."""


@torch.no_grad()
def inspect_batch(batch: RecordedBatch, *, num_experts: int | None = None) -> Inspection:
    """Measure a batch; what it does not hold is left out."""
    holds = [
        name
        for name in (*LOGPROBS, "advantages", "routes", "trainer_routes", "versions")
        if getattr(batch, name) is not None
    ]
    found = Inspection(
        source=batch.source,
        sequences=len(batch.mask),
        tokens=int(batch.mask.sum()),
        holds=holds,
        notes=list(batch.notes),
    )
    for name in (*LOGPROBS, "advantages"):
        value = getattr(batch, name)
        if value is not None:
            bad = int((~value[batch.mask].isfinite()).sum())
            if bad:
                found.not_finite[name] = bad
    _compare(batch, found)
    _branches(batch, found)
    _routes(batch, found, num_experts)
    if batch.versions is not None:
        first = batch.versions.masked_fill(~batch.mask, torch.iinfo(torch.int64).max).amin(1)
        last = batch.versions.masked_fill(~batch.mask, -1).amax(1)
        mixed = (first < last)[batch.mask.any(1)].double().mean()
        found.metrics["rollout/mixed_versions"] = float(mixed)
    return found


def _compare(batch: RecordedBatch, found: Inspection) -> None:
    for numerator, denominator, name in PAIRS:
        top, bottom = getattr(batch, numerator), getattr(batch, denominator)
        if top is None or bottom is None:
            continue
        mask = batch.mask & top.isfinite() & bottom.isfinite()
        if not mask.any():
            continue
        found.pairs.append(_pair(top, bottom, mask, (numerator, denominator, name)))
        if denominator == "old_logprobs":
            found.metrics |= ratio_statistics(top, bottom, mask)
        elif numerator == "logprobs":
            found.metrics |= ratio_tail(top, bottom, mask, prefix="rollout_ratio")
    trainer, engine = batch.trainer_logprobs, batch.rollout_logprobs
    if trainer is not None and engine is not None:
        mask = batch.mask & trainer.isfinite() & engine.isfinite()
        found.metrics |= mismatch_statistics(trainer, engine, mask)
        pairs = torch.stack([engine[mask], trainer[mask]], dim=1).double().exp()
        step = max(1, -(-len(pairs) // POINTS))
        found.scatter = [(_short(a), _short(b)) for a, b in pairs[::step].tolist()]


def _short(probability: float) -> float:
    """Five digits: more than a picture shows, a third of the file."""
    return float(f"{probability:.5g}")


def _pair(top: Tensor, bottom: Tensor, mask: Tensor, names: tuple[str, str, str]) -> Pair:
    log_w = (top.double() - bottom.double()).masked_fill(~mask, 0.0)
    w = log_w.exp().masked_fill(~mask, 0.0)
    own, size = log_w[mask], log_w[mask].abs()
    counts = mask.sum(1).double()
    mean = w.sum() / counts.sum()
    # Tokens of a sequence are alike: the sequence is what was drawn. Error of a ratio of sums.
    kept = counts > 0
    residual = (w.sum(1) - mean * counts)[kept]
    number = int(kept.sum())
    spread = residual.square().sum() * number / max(number - 1, 1)
    return Pair(
        numerator=names[0],
        denominator=names[1],
        name=names[2],
        tokens=int(mask.sum()),
        sequences=number,
        mean=float(mean),
        mean_error=float(spread.sqrt() / counts.sum()) if number > 1 else math.nan,
        survival=[(t, float((own > math.log(t)).double().mean())) for t in TAIL],
        extreme=[(t, float((size > math.log(t)).double().mean())) for t in TAUS],
        largest=float(own.max().exp()),
    )


def _branches(batch: RecordedBatch, found: Inspection) -> None:
    """Where the gradient of the paper's GRPO surrogate would come from on this batch."""
    old = batch.rollout_logprobs if batch.old_logprobs is None else batch.old_logprobs
    new, advantages = batch.logprobs, batch.advantages
    if new is None or old is None or advantages is None:
        return
    mask = batch.mask & new.isfinite() & old.isfinite() & advantages.isfinite()
    if not mask.any():
        return
    clean = [value.masked_fill(~mask, 0.0).double() for value in (new, old, advantages)]
    with torch.enable_grad():
        leaf = clean[0].requires_grad_()
        inputs = make_inputs(leaf, clean[1], clean[2], mask)
        loss = aggregate(grpo_loss(inputs), inputs, "sequence_mean")
        gradient = torch.autograd.grad(loss, leaf)[0]
    flipped = torch.zeros_like(mask)
    if batch.routes is not None and batch.trainer_routes is not None:
        flipped = (statistics.churn(batch.routes, batch.trainer_routes, mask) > 0).any(-1)
    found.metrics |= branch_shares(gradient, leaf.detach() - clean[1], clean[2], mask, flipped)


def _routes(batch: RecordedBatch, found: Inspection, num_experts: int | None) -> None:
    routes, trainer = batch.routes, batch.trainer_routes
    if routes is None:
        return
    recorded = (routes >= 0).all(-1)[batch.mask]
    found.metrics["replay/coverage"] = float(recorded.double().mean())
    # What lies elsewhere, as in padding, is nobody's route.
    own = routes.masked_fill(~batch.mask[..., None, None], NO_RECORD)
    dense = Record(routes=own).zero_layers
    if dense.any() and not dense.all() and routes.shape[-1] > 1:
        own = own[:, :, ~dense]
        found.notes.append(
            f"layers {dense.nonzero().flatten().tolist()} hold zeros alone: taken for dense "
            "layers, which have no router; if they have one, their record was lost"
        )
    found.laws = check_trace(own, num_experts=num_experts, response=batch.mask, tokens=batch.tokens)
    if trainer is None:
        return
    churn = statistics.churn(routes, trainer, batch.mask)
    routers = statistics.router_disagreement(churn)
    layers = torch.stack([statistics.per_layer(churn), statistics.per_layer(routers)], dim=1)
    found.by_layer = [(a, b) for a, b in layers.tolist()]
    found.best_shift = _best_shift(routes, trainer, batch.mask)
    means = statistics.disagreement(churn)
    found.metrics |= {f"mismatch/{name}": value for name, value in means.items()}


def _best_shift(routes: Tensor, trainer: Tensor, mask: Tensor) -> int:
    """The move of `routes` over T, -1 or 1, that halves the routers which differ; 0: none does."""
    length = mask.shape[1]

    def differ(shift: int) -> float:
        theirs = slice(max(shift, 0), length + min(shift, 0))
        ours = slice(max(-shift, 0), length + min(-shift, 0))
        both = mask[:, ours] & mask[:, theirs]
        churn = statistics.churn(routes[:, ours], trainer[:, theirs], both)
        return float(statistics.router_disagreement(churn).nanmean().nan_to_num(1.0))

    best = min((-1, 1), key=differ)
    return best if differ(best) < differ(0) / 2 else 0


def to_json(found: Inspection) -> dict[str, Any]:
    """What inspection.json holds."""
    return {"schema": SCHEMA} | asdict(found)
