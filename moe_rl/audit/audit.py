"""Audit one checkpoint: sample once, read the same tokens in every way, and say what it means."""

import dataclasses
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import torch
import transformers
from torch import Tensor

from moe_rl import __version__
from moe_rl.audit.difference import Difference, Reading, compare_readings
from moe_rl.audit.verdict import shape_verdict, verdict
from moe_rl.audit.ways import (
    Kind,
    Missing,
    Reference,
    Way,
    read_reference,
    read_replayed,
    read_way,
    ways_of_copies,
    ways_of_policy,
)
from moe_rl.batch import RolloutBatch, response_positions
from moe_rl.config import (
    AUDIT_PRECISIONS,
    AuditPrecision,
    ConfigError,
    EngineName,
    ModelConfig,
    RolloutPrecision,
)
from moe_rl.policy.fit import check_prompt
from moe_rl.policy.forward import ForwardOutput
from moe_rl.policy.policy import Policy, build_policy
from moe_rl.replay_check.check_trace import check_trace
from moe_rl.rollout.cached import CachedEngine
from moe_rl.rollout.engine import check_engine, make_engine
from moe_rl.rollout.request import Request
from moe_rl.routing import find_routers
from moe_rl.routing.statistics import churn
from moe_rl.tasks.base import Prompt
from moe_rl.traces.files import Trace

SCHEMA = 1
HEADING = (
    f"{'against the reference':<28} {'routers':>8} {'tokens':>8} {'KL k3':>9} {'replayed':>9} "
    f"{'F(2)':>8}"
)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The rollout whose tokens are read, and how many are read at once."""

    group_size: int = 4
    """Responses to each prompt."""
    max_tokens: int = 64
    """Longest response."""
    temperature: float = 1.0
    seed: int = 0
    sequences_per_pass: int = 32
    """Sequences that one forward pass reads."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One reading, and what it differs in."""

    name: str
    kind: Kind
    difference: Difference

    def describe(self) -> str:
        """A line of the table that `HEADING` heads."""
        found = self.difference
        replayed = "-" if found.replayed is None else f"{found.replayed.kl_k3:.1e}"
        return (
            f"{self.name:<28} {found.router_disagreement:8.2%} {found.token_disagreement:8.2%} "
            f"{found.live.kl_k3:9.1e} {replayed:>9} {found.live.extreme_2:8.2%}"
        )


@dataclass(kw_only=True)
class Audit:
    """Everything that was measured; `to_json` writes it."""

    checkpoint: str
    model: str
    """Class and sizes."""
    reference: str
    """What all others are held against."""
    sample: Sample
    prompts: int
    tokens: int
    margin_unit: str
    rows: list[Row] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)
    seconds: float = 0.0
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def verdicts(self) -> list[str]:
        """Sentences, the numerics and engines first."""
        found = [
            verdict(row.name, row.kind, row.difference)
            for kind in ("engine", "trace", "numerics")
            for row in self.rows
            if row.kind == kind
        ]
        for kind, what in (
            ("experts", "Experts backends"),
            ("shape", "Batch shapes, padding and cache"),
            ("again", "The same pass twice"),
        ):
            rows = [(row.name, row.difference) for row in self.rows if row.kind == kind]
            if rows:
                found.append(shape_verdict(rows, what))
        return found

    def to_json(self) -> dict[str, Any]:
        """What audit.json holds."""
        rows = [
            {"name": row.name, "kind": row.kind}
            | dataclasses.asdict(row.difference)
            | {"removed": row.difference.removed}
            for row in self.rows
        ]
        own = {
            item.name: getattr(self, item.name)
            for item in dataclasses.fields(self)
            if item.name not in ("rows", "missing", "sample")
        }
        return {
            "schema": SCHEMA,
            **own,
            "sample": dataclasses.asdict(self.sample),
            "verdicts": self.verdicts,
            "rows": rows,
            "missing": [missing._asdict() for missing in self.missing],
        }


def audit_model(
    config: ModelConfig,
    prompts: Sequence[Prompt],
    sample: Sample,
    *,
    precisions: tuple[AuditPrecision, ...] = AUDIT_PRECISIONS,
    engine: EngineName | None = None,
    engine_precision: RolloutPrecision = "float32",
    trace: tuple[str, Trace] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Audit:
    """Measure a checkpoint on a rollout of its own responses to `prompts`.

    Args:
        config: names the checkpoint, and the arithmetic of the reference.
        prompts: texts or lists of messages.
        sample: how the responses are drawn.
        precisions: 16-bit arithmetics and roundings of weights to hold against the reference.
        engine: samples a rollout of its own, on which it is held against the reference.
        engine_precision: what it computes with.
        trace: name and content of a recorded trace of tokens and routes.
        progress: told of each reading.

    Raises:
        ConfigError: the checkpoint or the engine cannot be used, a prompt does not fit, or
            the trace has no tokens or is another model's.
    """
    start = time.perf_counter()
    policy = build_policy(config, "", temperature=sample.temperature, fuse=False)
    if engine is not None:
        check_engine(engine, policy.model, engine_precision, trained=False)
    for number, prompt in enumerate(prompts, start=1):
        check_prompt(policy, prompt, sample.max_tokens, f"prompts, number {number}")
    taps = find_routers(policy.model)
    traced = None if trace is None else _batch_of(policy, *trace)
    batch = CachedEngine(policy).sample(_request(prompts, sample))
    rows_at_once = sample.sequences_per_pass
    reference = read_reference(policy, batch, rows_at_once)
    audit = Audit(
        checkpoint=str(config.checkpoint),
        model=f"{type(policy.model).__name__}: {len(taps)} routers, {taps[0].top_k} of "
        f"{taps[0].num_experts} experts",
        reference=f"{config.dtype}, experts {policy.experts}, whole sequences, "
        f"{policy.device.type}",
        sample=sample,
        prompts=len(prompts),
        tokens=int(batch.response_mask.sum()),
        margin_unit="logits" if all(tap.ranks_by_logits for tap in taps) else "scores",
        environment=_environment(),
    )

    def add(name: str, kind: Kind, difference: Difference) -> None:
        row = Row(name=name, kind=kind, difference=difference)
        audit.rows.append(row)
        progress(row.describe())

    add("sampled token by token", "shape", _of_engine(policy, batch, rows_at_once, reference))
    for way in ways_of_policy(policy, batch, precisions, rows_at_once):
        _add_way(audit, way, batch, reference, add)
    if engine is not None:
        drawn = make_engine(engine, policy, engine_precision).sample(_request(prompts, sample))
        name = f"engine {engine} {engine_precision}"
        add(name, "engine", _of_engine(policy, drawn, rows_at_once))
    if trace is not None and traced is not None:
        laws = check_trace(
            trace[1].routed_experts, num_experts=taps[0].num_experts, response=trace[1].response
        )
        broken = [law for law in laws if law.passed is False]
        audit.missing += [Missing(f"trace: law {law.check} fails", law.reason) for law in broken]
        add(f"trace {trace[0]}", "trace", _of_trace(policy, *traced, rows_at_once))
    del policy  # or a copy of another type would lie beside it
    for way in ways_of_copies(
        config, batch, precisions, rows_at_once, temperature=sample.temperature
    ):
        _add_way(audit, way, batch, reference, add)
    order = [*get_args(Kind), *precisions]
    audit.rows.sort(key=lambda row: [order.index(row.kind), *_place(order, row.name)])
    audit.seconds = time.perf_counter() - start
    return audit


def _place(order: list[str], name: str) -> list[int]:
    """Where numerics stand among themselves: as they were asked for."""
    return [order.index(word) for word in name.split()[:1] if word in order]


def _request(prompts: Sequence[Prompt], sample: Sample) -> Request:
    return Request(
        prompts=prompts,
        numbers=range(len(prompts)),
        seed=sample.seed,
        purpose="audit",
        group_size=sample.group_size,
        max_tokens=sample.max_tokens,
    )


def _add_way(
    audit: Audit,
    way: Way | Missing,
    batch: RolloutBatch,
    reference: Reference,
    add: Callable[[str, Kind, Difference], None],
) -> None:
    """Read in one way, by its own routes and, where they differ, by the reference's."""
    if isinstance(way, Missing):
        audit.missing.append(way)
        return
    output = read_way(way, None)
    if isinstance(output, Missing):
        audit.missing.append(output)
        return

    def replay() -> ForwardOutput | None:
        found = read_way(way, reference.output.routed_experts)
        if isinstance(found, Missing):
            audit.missing.append(found._replace(name=f"{way.name}, replayed"))
            return None
        return found

    width = batch.prompt_ids.shape[1]
    own = _reading(reference.output.logprobs, reference.output.routed_experts, width)
    other = _reading(output.logprobs, output.routed_experts, width)
    add(way.name, way.kind, _difference(own, other, batch, reference, replay))


def _of_engine(
    policy: Policy, batch: RolloutBatch, rows: int, reference: Reference | None = None
) -> Difference:
    """An engine's own rollout against the reference's pass over it, live and by its routes."""
    reference = reference or read_reference(policy, batch, rows)
    width, record = batch.prompt_ids.shape[1], batch.routed_experts
    assert record is not None
    engine = _reading(batch.rollout_logprobs, record, width)
    live = _reading(reference.output.logprobs, reference.output.routed_experts, width)
    return _difference(
        engine, live, batch, reference, lambda: read_replayed(policy, batch, record, rows)
    )


def _difference(
    mu: Reading,
    pi: Reading,
    batch: RolloutBatch,
    reference: Reference,
    replay: Callable[[], ForwardOutput | None],
) -> Difference:
    """Two readings of a rollout; `replay` reads pi by the routes of mu, where theirs differ."""
    differ = bool((churn(mu.routes, pi.routes, batch.response_mask) > 0).any())
    replayed = replay() if differ else None
    return compare_readings(
        mu,
        pi,
        batch.response_mask,
        group_size=batch.group_size,
        same_routes=None if replayed is None else (mu, replace(mu, logprobs=replayed.logprobs)),
        margins=reference.margins,
    )


def _of_trace(policy: Policy, batch: RolloutBatch, mask: Tensor, rows: int) -> Difference:
    """This model by a trace's routes against itself live: what they alone change."""
    reference = read_reference(policy, batch, rows)
    width, record = batch.prompt_ids.shape[1], batch.routed_experts
    assert record is not None
    return compare_readings(
        _reading(read_replayed(policy, batch, record, rows).logprobs, record, width),
        _reading(reference.output.logprobs, reference.output.routed_experts, width),
        mask,
        group_size=1,
        margins=reference.margins,
    )


def _batch_of(policy: Policy, name: str, trace: Trace) -> tuple[RolloutBatch, Tensor]:
    """The tokens of a trace as a rollout whose first token is its prompt, and those to compare.

    The mask is bool [B, T]: response tokens that are predicted where there is a record.
    """
    if trace.tokens is None:
        raise ConfigError(
            f"trace={name!r}: holds no token ids, so the model cannot read the same tokens; record "
            "prompt_token_ids and token_ids beside the routes"
        )
    taps = find_routers(policy.model)
    shape = tuple(trace.routed_experts.shape[2:])
    if shape != (len(taps), taps[0].top_k):
        raise ConfigError(
            f"trace={name!r}: routes of {shape[0]} layers and {shape[1]} experts a token, the "
            f"model has {len(taps)} routers that choose {taps[0].top_k}; give a trace of this model"
        )
    words = policy.model.get_input_embeddings().num_embeddings
    if int(trace.tokens.max()) >= words:
        raise ConfigError(
            f"trace={name!r}: token id {int(trace.tokens.max())}, the model embeds {words}; give a "
            "trace of this model"
        )
    if int(trace.routed_experts.max()) >= taps[0].num_experts:
        raise ConfigError(
            f"trace={name!r}: expert id {int(trace.routed_experts.max())}, the model has "
            f"{taps[0].num_experts} experts; give a trace of this model"
        )
    context = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and trace.tokens.shape[1] > context:
        raise ConfigError(
            f"trace={name!r}: sequences of {trace.tokens.shape[1]} tokens, the model's context is "
            f"{context}; give a trace of this model"
        )
    routes, tokens = trace.routed_experts.to(policy.device), trace.tokens.to(policy.device)
    kept = tokens >= 0
    ids = tokens.masked_fill(~kept, policy.pad_id)
    mask = kept[:, 1:] & (routes[:, :-1] >= 0).flatten(2).all(-1)
    if trace.response is not None:
        mask &= trace.response[:, :-1].to(policy.device)
    if not mask.any():
        raise ConfigError(f"trace={name!r}: no response token has a record; give another trace")
    batch = RolloutBatch(
        prompt_ids=ids[:, :1],
        prompt_mask=kept[:, :1],
        response_ids=ids[:, 1:],
        response_mask=kept[:, 1:],
        rollout_logprobs=torch.zeros(ids[:, 1:].shape, device=ids.device),
        routed_experts=routes,
        router_logits=None,
        truncated=torch.zeros(len(ids), dtype=torch.bool, device=ids.device),
    )
    return batch, mask


def _reading(logprobs: Tensor, record: Tensor | None, width: int) -> Reading:
    assert record is not None
    return Reading(logprobs=logprobs, routes=response_positions(record, width))


def _environment() -> dict[str, str]:
    return {
        "moe_rl": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
    }
