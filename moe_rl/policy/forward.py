"""The one forward pass RL needs: log-probs of a rollout's response tokens, and what routing did.

Three layouts read the same tokens to the same numbers, up to rounding:

    one_pass   all prompts and responses as the rows of one sequence: fused attention only, fastest
    cached     each prompt once per group into a key-value cache, then the responses: most models
    whole      every sequence from its first token: gradient checkpointing, which forbids a cache,
               and models whose cache serves no group

Shapes: P prompts, B = P * G responses, Sp prompt and T response positions, L MoE layers, E experts,
K experts per token, H hidden.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from moe_rl.batch import RolloutBatch, full_record, predictions
from moe_rl.cpu import FastPath
from moe_rl.kernels import TokenLogprobs, token_logprobs
from moe_rl.policy.pass_noise import NoiseDraw, PassNoise
from moe_rl.policy.policy import Policy
from moe_rl.routing import record_routing, replay_routing, router_noise

Layout = Literal["one_pass", "cached", "whole"]
Replayed = tuple[Tensor | None, Tensor | None]
"""Ids and gate weights that a call of the model replays, `[B, S, L, K]`; None: nothing."""


@dataclass(frozen=True, kw_only=True)
class ForwardOptions:
    """How one forward pass treats routing, and what it returns."""

    replay: Tensor | None = None
    """int16 [B, Sp + T, L, K] expert choices to replay; None: live routing."""
    replay_weights: Tensor | None = None
    """float32 [B, Sp + T, L, K] gate weights to replay with them; None: those of the routers."""
    record: bool = True
    """Return the live expert choices."""
    router_logits: bool = False
    """Return the router logits."""
    entropy: bool = False
    """Return the entropy of each predicted distribution."""
    noise: PassNoise | None = None
    """Noise on the choice of experts, or on the last hidden states."""
    value_head: Callable[[Tensor], Tensor] | None = None
    """Makes values [B, T] of hidden states [B, T, H]; None: return no values."""
    record_weights: bool = False
    """Record gate weights in passes without replay; for callers of `routing_contexts`."""

    def replayed(self, select: Callable[[Tensor], Tensor]) -> Replayed:
        """What some tokens replay: `select` picks their rows of ids and of gate weights."""
        ids, weights = self.replay, self.replay_weights
        if ids is None:
            return None, None
        return select(ids), None if weights is None else select(weights)


class ForwardOutput(NamedTuple):
    """Result of `response_pass`; tensors over the T response tokens of B sequences."""

    logprobs: Tensor
    """float32 [B, T]; meaningless where the response mask is False."""
    entropy: Tensor | None
    """float32 [B, T] in nats, no gradient."""
    routed_experts: Tensor | None
    """int16 [B, Sp + T, L, K]: the live choices, also while replaying; the last row is -1."""
    router_logits: Tensor | None
    """float32 [B, T, L, E] where each response token is predicted."""
    values: Tensor | None = None
    """float32 [B, T] where each response token is predicted."""
    replayed: Tensor | None = None
    """bool [B, T, L]: the routers that were given their recorded choice where each response token
    is predicted; None where nothing is replayed."""

    @staticmethod
    def concatenate(outputs: list["ForwardOutput"]) -> "ForwardOutput":
        """The outputs of consecutive parts of a batch as one."""
        if len(outputs) == 1:
            return outputs[0]
        fields = zip(*outputs, strict=True)
        joined = (None if values[0] is None else torch.cat(values) for values in fields)
        return ForwardOutput._make(joined)

    def select_sequences(self, sequences: slice) -> "ForwardOutput":
        """The output for some of the sequences."""
        parts = (None if value is None else value[sequences] for value in self)
        return ForwardOutput._make(parts)


def response_pass(
    policy: Policy, batch: RolloutBatch, options: ForwardOptions, layout: Layout | None = None
) -> ForwardOutput:
    """Log-probs of the batch's response tokens under the current weights, at its temperature.

    Gradients flow where grad mode is on. Without a `layout`, `choose_layout` decides.
    """
    read = _LAYOUTS[layout or choose_layout(policy)]
    # Responses of one token are predicted by the prompt alone: there is nothing to read after it.
    if batch.response_ids.shape[1] == 1 and read is _one_pass:
        read = _cached
    seen = read(policy, batch, options)
    hidden = options.noise.hidden_adder()(seen.hidden) if options.noise else seen.hidden
    found = score_tokens(policy, hidden, batch.response_ids, entropy=options.entropy)
    return ForwardOutput(
        logprobs=found.logprobs,
        entropy=None if found.entropy is None else found.entropy.detach(),
        routed_experts=seen.routes,
        router_logits=seen.router_logits,
        values=None if options.value_head is None else options.value_head(seen.hidden),
        replayed=seen.replayed,
    )


def score_tokens(
    policy: Policy, hidden: Tensor, ids: Tensor, *, entropy: bool = False
) -> TokenLogprobs:
    """Log-probs of tokens `ids` from the hidden states that predict them, at the temperature.

    Hidden states [..., H] and int64 ids [...] of equal leading axes.
    """
    head = policy.model.get_output_embeddings()
    return token_logprobs(
        hidden.to(head.weight.dtype),
        head.weight,
        ids,
        bias=head.bias,
        temperature=policy.temperature / policy.final.scale,
        softcap=policy.final.softcap,
        ignore_index=None,  # what counts is the caller's mask to say
        entropy=entropy,
    )


def choose_layout(policy: Policy) -> Layout:
    """The fastest layout that the model, as it is now, allows."""
    if policy.gradient_checkpointing or policy.reads_whole:
        return "whole"
    return "one_pass" if FastPath(policy.model).is_installed() else "cached"


@contextlib.contextmanager
def routing_contexts(
    model: Any,
    options: ForwardOptions,
    replay: Replayed = (None, None),
    noise: NoiseDraw | None = None,
) -> Iterator[Any]:
    """Record, replay and noise around those calls of a model that share one record.

    `replay` and `noise` are for the tokens of these calls; those in `options` are for the whole
    rollout and are not read.
    """
    with contextlib.ExitStack() as stack:
        if noise is not None:
            stack.enter_context(router_noise(model, noise))
        ids, weights = replay
        logits = options.router_logits
        if ids is not None:
            yield stack.enter_context(
                replay_routing(
                    model, ids, gate_weights=weights, router_logits=logits, validate=False
                )
            )
        elif options.record or logits:
            yield stack.enter_context(
                record_routing(model, router_logits=logits, gate_weights=options.record_weights)
            )
        else:
            yield None


class _Read(NamedTuple):
    """What a layout reads of a batch."""

    hidden: Tensor
    """[B, T, H] where each response token is predicted."""
    routes: Tensor | None
    router_logits: Tensor | None
    replayed: Tensor | None
    """These three as in `ForwardOutput`."""


def _one_pass(policy: Policy, batch: RolloutBatch, options: ForwardOptions) -> _Read:
    group, prompt_length = batch.group_size, batch.prompt_ids.shape[1]

    def select_rows(record: Tensor) -> Tensor:
        # A prompt is read once per group, and the last token of a response is never read.
        prompts, responses = record[::group, :prompt_length], record[:, prompt_length:-1]
        return torch.cat([prompts.flatten(0, 1), responses.flatten(0, 1)]).unsqueeze(0)

    replay = options.replayed(select_rows)
    noise = options.noise.for_rows(prompt_length) if options.noise else None
    with routing_contexts(policy.model, options, replay, noise) as seen:
        prompt_hidden, response_hidden = FastPath(policy.model).read_in_one_pass(
            batch.prompt_ids,
            batch.response_ids[:, :-1],
            None if bool(batch.prompt_mask.all()) else batch.prompt_mask,
        )
    routes = logits = replayed = None
    if options.record:
        routes = full_record(*_split_rows(_live(seen), batch), group)
    if options.router_logits:
        logits = predictions(*_split_rows(seen.router_logits, batch), group)
    if options.replay is not None:
        replayed = predictions(*_split_rows(seen.replayed, batch), group)
    return _Read(predictions(prompt_hidden, response_hidden, group), routes, logits, replayed)


def _split_rows(rows: Tensor, batch: RolloutBatch) -> tuple[Tensor, Tensor]:
    """`[1, P * Sp + B * (T - 1), ...]` of one pass as `[P, Sp, ...]` and `[B, T - 1, ...]`."""
    prompts, end = rows[0].split(
        [batch.prompt_ids.numel(), rows.shape[1] - batch.prompt_ids.numel()]
    )
    responses = end.view(batch.response_ids.shape[0], -1, *end.shape[1:])
    return prompts.view(*batch.prompt_ids.shape, *prompts.shape[1:]), responses


def _cached(policy: Policy, batch: RolloutBatch, options: ForwardOptions) -> _Read:
    group, prompt_length = batch.group_size, batch.prompt_ids.shape[1]
    noise = options.noise
    # Prompts and responses are two reads of different batch sizes, so two records and two replays.
    replay = options.replayed(lambda record: record[::group, :prompt_length])
    draws = noise.for_prompts() if noise else None
    with routing_contexts(policy.model, options, replay, draws) as seen_prompts:
        prompt_hidden, cache = policy.read_prompts(batch.prompt_ids, batch.prompt_mask)
    cache.batch_repeat_interleave(group)  # differentiable: gradients of a group meet in its prompt
    rest = seen = None
    if batch.response_ids.shape[1] > 1:
        replay = options.replayed(lambda record: record[:, prompt_length:-1])
        draws = noise.for_responses() if noise else None
        with routing_contexts(policy.model, options, replay, draws) as seen:
            rest = policy.continue_responses(
                batch.response_ids[:, :-1], cache, batch.prompt_mask, group
            )
    routes = logits = replayed = None
    if options.record:
        routes = full_record(_live(seen_prompts), seen and _live(seen), group)
    if options.router_logits:
        logits = predictions(seen_prompts.router_logits, seen and seen.router_logits, group)
    if options.replay is not None:
        replayed = predictions(seen_prompts.replayed, seen and seen.replayed, group)
    return _Read(predictions(prompt_hidden, rest, group), routes, logits, replayed)


def _whole(policy: Policy, batch: RolloutBatch, options: ForwardOptions) -> _Read:
    group, prompt_length = batch.group_size, batch.prompt_ids.shape[1]
    prompt_mask = batch.prompt_mask.repeat_interleave(group, dim=0)
    ids = torch.cat(
        [batch.prompt_ids.repeat_interleave(group, dim=0), batch.response_ids[:, :-1]], dim=1
    )
    mask = torch.nn.functional.pad(prompt_mask, (0, ids.shape[1] - prompt_length), value=True)
    replay = options.replayed(lambda record: record[:, :-1])
    noise = options.noise.for_sequences(prompt_length) if options.noise else None
    with routing_contexts(policy.model, options, replay, noise) as seen:
        hidden = policy.read_whole(ids, mask)
    routes = logits = replayed = None
    if options.record:
        live = _live(seen)
        # The last sampled token is never read: -1 means no record.
        routes = torch.cat([live, torch.full_like(live[:, :1], -1)], dim=1)
    if options.router_logits:
        logits = seen.router_logits[:, prompt_length - 1 :]
    if options.replay is not None:
        replayed = seen.replayed[:, prompt_length - 1 :]
    return _Read(hidden[:, prompt_length - 1 :], routes, logits, replayed)


_LAYOUTS = {"one_pass": _one_pass, "cached": _cached, "whole": _whole}


def _live(seen: Any) -> Tensor:
    """The live choices that a record or a replay context saw."""
    live = getattr(seen, "live_routed_experts", None)
    return seen.routed_experts if live is None else live
