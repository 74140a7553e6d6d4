"""Ways to read the same tokens with the same weights, which in exact arithmetic agree.

    again      the reference's own pass once more: any difference is nondeterminism
    shape      padding on either side, a sequence alone, a key-value cache, our fused CPU layers
    experts    the backends of transformers' ExpertsInterface that run here
    numerics   weights and arithmetic of another type, or weights rounded to 8 or 4 bits

The reference reads whole sequences, padded in front, by transformers' own layers. A way that cannot
be had with this model or on this machine is a `Missing` with the reason.

Shapes: B sequences, Sp prompt and T response positions, L MoE layers, K experts a token.
"""

import contextlib
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from moe_rl.batch import RolloutBatch
from moe_rl.config import AuditPrecision, ConfigError, ModelConfig
from moe_rl.cpu import FastPath
from moe_rl.experts import choose_experts, valid_experts
from moe_rl.policy.build import build_policy
from moe_rl.policy.forward import ForwardOptions, ForwardOutput, Layout, response_pass, score_tokens
from moe_rl.policy.policy import Policy
from moe_rl.rollout.precision import rounded_weights
from moe_rl.routing import record_routing, replay_routing

Kind = Literal["again", "shape", "experts", "numerics", "engine", "trace"]
Side = Literal["left", "right"]
Read = Callable[[Tensor | None], ForwardOutput]
"""Read a rollout's responses, by the routes int16 [B, Sp + T, L, K] given or by the router's."""

_ARITHMETIC = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_PADDING = 8  # tokens
# What kernels and models raise where they were not made for a type, a device or a shape.
ERRORS = (RuntimeError, NotImplementedError, TypeError, ValueError, ImportError, AssertionError)


class Way(NamedTuple):
    """One way to read."""

    name: str
    kind: Kind
    read: Read


class Missing(NamedTuple):
    """A way that could not be had, and why."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The reading that all others are held against."""

    output: ForwardOutput
    """Log-probs and routes of the rollout."""
    margins: Tensor
    """float32 [B, T, L], see `RecordedRouting.router_margins`."""


@torch.no_grad()
def read_reference(policy: Policy, batch: RolloutBatch, rows: int) -> Reference:
    """Read the batch's whole sequences, `rows` of them at a time."""
    output, margins = _read_sequences(policy, batch, None, rows=rows)
    return Reference(output=output, margins=margins)


@torch.no_grad()
def read_replayed(policy: Policy, batch: RolloutBatch, record: Tensor, rows: int) -> ForwardOutput:
    """The reference's way to read, by recorded routes."""
    return _read_sequences(policy, batch, record, rows=rows)[0]


def ways_of_policy(
    policy: Policy, batch: RolloutBatch, precisions: tuple[AuditPrecision, ...], rows: int
) -> Iterator[Way | Missing]:
    """Every way that needs no other copy of the weights. A way holds until the next is taken."""

    read = _reader(policy, batch, rows)
    behind = _reader(policy, batch, rows, side="right", padding=_PADDING)
    yield Way("the same pass again", "again", read)
    yield Way("padding in front", "shape", _reader(policy, batch, rows, padding=_PADDING))
    yield Way("padding behind", "shape", behind)
    yield Way("one sequence at a time", "shape", _reader(policy, batch, 1))
    yield from _layouts(policy, batch, rows)
    yield from _experts(policy, read)
    for name in precisions:
        if name not in _ARITHMETIC:
            yield from _rounded(policy, name, read)


def ways_of_copies(
    config: ModelConfig,
    batch: RolloutBatch,
    precisions: tuple[AuditPrecision, ...],
    rows: int,
    *,
    temperature: float,
) -> Iterator[Way | Missing]:
    """The arithmetics that transformers loads the checkpoint in, one copy after the other."""
    for name in precisions:
        dtype = _ARITHMETIC.get(name)
        if dtype is None or str(dtype) == f"torch.{config.dtype}":
            continue
        try:
            policy = build_policy(config, "", temperature=temperature, fuse=False, dtype=dtype)
        except (*ERRORS, ConfigError) as error:
            yield Missing(name, one_line(error))
            continue
        yield Way(name, "numerics", _reader(policy, batch, rows))
        del policy


def _reader(
    policy: Policy, batch: RolloutBatch, rows: int, *, side: Side = "left", padding: int = 0
) -> Read:
    return lambda replay: _read_sequences(
        policy, batch, replay, side=side, padding=padding, rows=rows
    )[0]


def read_way(way: Way, replay: Tensor | None) -> ForwardOutput | Missing:
    """What a way reads, or why it cannot."""
    try:
        with torch.no_grad():
            return way.read(replay)
    except ERRORS as error:
        return Missing(way.name, one_line(error))


def one_line(error: BaseException) -> str:
    """What an error says, and its type where it is not one of ours."""
    said = " ".join(str(error).split())
    ours = said if isinstance(error, ValueError) else f"{type(error).__name__}: {said}"
    return textwrap.shorten(ours, 300)


def _layouts(policy: Policy, batch: RolloutBatch, rows: int) -> Iterator[Way | Missing]:
    """Prompts once a group into a cache; and our fused layers, where they serve the model."""
    if policy.reads_whole:
        yield Missing("a key-value cache", "the model's cache does not serve a group of responses")
    else:
        yield Way("a key-value cache", "shape", _response_passes(policy, batch, rows, "cached"))
    fast = FastPath(policy.model)
    if not fast.install():
        return
    try:
        yield Way(
            "moe-rl's fused CPU layers", "shape", _response_passes(policy, batch, rows, "one_pass")
        )
    finally:
        fast.remove()


def _response_passes(policy: Policy, batch: RolloutBatch, rows: int, layout: Layout) -> Read:
    group = batch.group_size
    prompts = max(1, rows // group)

    def read(replay: Tensor | None) -> ForwardOutput:
        outputs = []
        for start in range(0, batch.prompt_ids.shape[0], prompts):
            chosen = slice(start, start + prompts)
            own = None if replay is None else replay[start * group : (start + prompts) * group]
            options = ForwardOptions(replay=own)
            outputs.append(response_pass(policy, batch.select_prompts(chosen), options, layout))
        return ForwardOutput.concatenate(outputs)

    return read


def _experts(policy: Policy, read: Read) -> Iterator[Way | Missing]:
    if policy.experts == "own":
        yield Missing("other experts backends", "the model computes its experts by its own code")
        return
    try:
        for name in valid_experts():
            if name in ("auto", policy.experts):
                continue
            try:
                choose_experts(policy.device, name)
                policy.model.set_experts_implementation(name)
            except ERRORS as error:
                yield Missing(f"experts {name}", one_line(error))
            else:
                yield Way(f"experts {name}", "experts", read)
    finally:
        policy.model.set_experts_implementation(policy.experts)


def _rounded(policy: Policy, name: AuditPrecision, read: Read) -> Iterator[Way | Missing]:
    assert name in ("fp8", "int8", "int4")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(rounded_weights(policy.model, name))
        except ConfigError as error:
            yield Missing(f"{name} weights", one_line(error))
        else:
            yield Way(f"{name} weights", "numerics", read)


def _read_sequences(
    policy: Policy,
    batch: RolloutBatch,
    replay: Tensor | None,
    *,
    side: Side = "left",
    padding: int = 0,
    rows: int,
) -> tuple[ForwardOutput, Tensor]:
    """Whole sequences of at most `rows` a pass, padded to the longest and by `padding` more."""
    parts = [
        _read_some(
            policy,
            batch,
            range(start, min(start + rows, len(batch.response_ids))),
            replay,
            side=side,
            padding=padding,
        )
        for start in range(0, len(batch.response_ids), rows)
    ]
    outputs, margins = zip(*parts, strict=True)
    return ForwardOutput.concatenate([*outputs]), torch.cat(margins)


def _read_some(
    policy: Policy,
    batch: RolloutBatch,
    sequences: range,
    replay: Tensor | None,
    *,
    side: Side,
    padding: int,
) -> tuple[ForwardOutput, Tensor]:
    chosen = slice(sequences.start, sequences.stop)
    prompts = torch.tensor(sequences, device=policy.device) // batch.group_size
    ids = torch.cat([batch.prompt_ids[prompts], batch.response_ids[chosen]], dim=1)
    # The last token of a response is read too, here and in every other way: it predicts nothing.
    kept = torch.cat([batch.prompt_mask[prompts], batch.response_mask[chosen]], dim=1)
    place = _Places(kept, side, padding)
    mask = place.pack(kept, fill=False)
    with contextlib.ExitStack() as stack:
        if replay is not None:
            packed = place.pack(replay[chosen], fill=-1)
            stack.enter_context(replay_routing(policy.model, packed, validate=False))
        seen = stack.enter_context(record_routing(policy.model, router_margins=True))
        hidden = policy.read_whole(place.pack(ids, fill=policy.pad_id), mask)
    record = place.unpack(seen.routed_experts, fill=-1)
    width = batch.prompt_ids.shape[1]
    predicted = place.unpack(hidden, fill=0.0)[:, width - 1 : -1]
    margins = place.unpack(seen.router_margins, fill=torch.nan)[:, width - 1 : -1]
    # The last token is never read where a rollout continues: no record of it is one of all ways.
    record[:, -1] = -1
    record = record.masked_fill(~torch.nn.functional.pad(kept[:, 1:], (0, 1))[:, :, None, None], -1)
    found = score_tokens(policy, predicted, batch.response_ids[chosen])
    output = ForwardOutput(
        logprobs=found.logprobs, entropy=None, routed_experts=record, router_logits=None
    )
    return output, margins


class _Places:
    """Where the tokens of some sequences lie when they are padded otherwise."""

    def __init__(self, kept: Tensor, side: Side, padding: int) -> None:
        lengths = kept.sum(1)
        self.width = int(lengths.max()) + padding
        rank = kept.long().cumsum(1) - 1
        first = 0 if side == "right" else (self.width - lengths)[:, None]
        self.rows, self.columns = kept.nonzero(as_tuple=True)
        self.targets = (rank + first)[kept]
        self.shape = kept.shape

    def pack(self, values: Tensor, *, fill: float) -> Tensor:
        """`[B, S, ...]` of the batch to `[B, W, ...]` as padded here."""
        out = values.new_full((values.shape[0], self.width, *values.shape[2:]), fill)
        out[self.rows, self.targets] = values[self.rows, self.columns]
        return out

    def unpack(self, values: Tensor, *, fill: float) -> Tensor:
        """Back again."""
        out = values.new_full((*self.shape, *values.shape[2:]), fill)
        out[self.rows, self.columns] = values[self.rows, self.targets]
        return out
