"""Audit one checkpoint: sample once, read the same tokens in every way, and say what it means."""

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import get_args

import torch
import transformers
from torch import Tensor

from moe_rl import __version__
from moe_rl.audit.difference import Difference, Reading, compare_readings
from moe_rl.audit.result import Audit, Row, Sample
from moe_rl.audit.trace import batch_of_trace
from moe_rl.audit.ways import (
    ERRORS,
    Kind,
    Missing,
    Reference,
    Way,
    one_line,
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
    EngineName,
    ModelConfig,
    RolloutPrecision,
)
from moe_rl.policy.build import build_policy
from moe_rl.policy.fit import check_prompt
from moe_rl.policy.forward import ForwardOutput
from moe_rl.policy.policy import Policy
from moe_rl.replay_check.check_trace import check_trace
from moe_rl.rollout.cached import CachedEngine
from moe_rl.rollout.engine import check_engine, make_engine
from moe_rl.rollout.request import Request
from moe_rl.routing import find_routers
from moe_rl.routing.statistics import churn
from moe_rl.tasks.base import Prompt
from moe_rl.traces.files import Trace


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
    traced = None if trace is None else batch_of_trace(policy, *trace)
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

    if engine is not None:  # first: what it cannot do shows before the others are read
        name = f"engine {engine} {engine_precision}"
        try:
            drawn = make_engine(engine, policy, engine_precision).sample(_request(prompts, sample))
            add(name, "engine", _of_engine(policy, drawn, rows_at_once))
        except ERRORS as error:
            audit.missing.append(Missing(name, one_line(error)))
    add("sampled token by token", "shape", _of_engine(policy, batch, rows_at_once, reference))
    for way in ways_of_policy(policy, batch, precisions, rows_at_once):
        _add_way(audit, way, batch, reference, add)
    if trace is not None and traced is not None:
        laws = check_trace(
            trace[1].routed_experts,
            num_experts=taps[0].num_experts,
            response=trace[1].response,
            tokens=trace[1].tokens,
        )
        broken = [law for law in laws if law.passed is False]
        audit.missing += [Missing(f"trace: law {law.check} fails", law.reason) for law in broken]
        said = trace[1].logprobs is not None
        difference = _of_trace(policy, *traced, rows_at_once, said)
        add(f"trace {trace[0]}", "engine" if said else "trace", difference)
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


def _of_trace(
    policy: Policy, batch: RolloutBatch, mask: Tensor, rows: int, said: bool
) -> Difference:
    """The engine of a trace against this model; without its log-probs, what its routes change."""
    reference = read_reference(policy, batch, rows)
    width, record = batch.prompt_ids.shape[1], batch.routed_experts
    assert record is not None
    engine = _reading(batch.rollout_logprobs, record, width)
    by_record = replace(engine, logprobs=read_replayed(policy, batch, record, rows).logprobs)
    return compare_readings(
        engine if said else by_record,
        _reading(reference.output.logprobs, reference.output.routed_experts, width),
        mask,
        group_size=1,
        same_routes=(engine, by_record) if said else None,
        margins=reference.margins,
    )


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
