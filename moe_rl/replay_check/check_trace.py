"""Replay check: what can be wrong with routes recorded elsewhere, seen in the record alone.

Each check is a way in which an engine has handed over wrong routes without any error. Three places
hold a record against them: `moe-rl check-replay`, our vLLM engine, and R3 in TRL's trainer.

Whether rows are too much alike is a question of chance. A router that chose any K of E experts
alike would repeat a choice with probability 1 / binomial(E, K); trained routers have favourites.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import torch
from torch import Tensor

from moe_rl.replay_check.check_subject import sort_ids
from moe_rl.replay_check.claims import Claims, LawResult, judge_law

MIN_TOKENS = 4
"""Fewer tokens may agree by chance."""
REWRITTEN, REJOINED = 6, 8
"""Tokens that another tokenisation replaces at most, and that agree behind them at least."""
NEIGHBOURS, OTHERS = 1 / 8, 1 / 4
"""Information that one expert choice is assumed to carry, as a share of log C(E, K), that of a
uniform choice: 1/8 given the choice of the token before, 1/4 given those of other tokens. Measured
as -log P(same set) over log C(E, K) in eight cold starts of 2 or 4 layers with 8 or 32 experts, the
smallest were 0.12 and 0.17."""
CHANCE = math.log(1000)
"""Nats: a record is refused where honest routers would write it once in 1000 times, or less."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """A record under check, and what is known about it."""

    routes: Tensor
    """Integer ids `[B, S, L, K]`."""
    num_experts: int | None = None
    """E; None: ids have no upper bound."""
    response: Tensor | None = None
    """bool `[B, S]`, where response tokens are predicted, all of which must have a record."""
    tokens: Tensor | None = None
    """int64 `[B, S]`, the tokens that were routed."""

    @cached_property
    def recorded(self) -> Tensor:
        """bool `[B, S, L]`: pairs with a choice."""
        return (self.routes >= 0).all(dim=-1)

    @cached_property
    def whole(self) -> Tensor:
        """bool `[B, S]`: tokens with a choice in every layer."""
        return self.recorded.all(dim=-1)

    @cached_property
    def sets(self) -> Tensor:
        """The ids in ascending order: equal for equal sets of experts."""
        return sort_ids(self.routes)

    @property
    def experts(self) -> int:
        """E, or the fewest experts that there can be with a choice."""
        least = max(int(self.routes.max()), self.routes.shape[-1]) + 1
        return least if self.num_experts is None else self.num_experts

    @property
    def choices(self) -> float:
        """Log of the number of sets that a router can choose; 0 where every expert is always on."""
        return math.log(math.comb(max(self.experts, self.routes.shape[-1]), self.routes.shape[-1]))

    @property
    def zero_layers(self) -> Tensor:
        """bool `[L]`: layers that hold zeros wherever they hold anything."""
        zero = (self.routes == 0).all(dim=-1)
        return (zero | ~self.recorded).flatten(0, 1).all(dim=0) & zero.flatten(0, 1).any(dim=0)

    def same_token(self) -> Tensor:
        """bool `[B, S - 1]`: a token is the one before it, so that it may go where that went."""
        if self.tokens is None:
            return torch.zeros_like(self.whole[:, 1:])
        return self.tokens[:, 1:] == self.tokens[:, :-1]


def _none_of(mask: Tensor, what: str, routes: Tensor) -> tuple[bool, str]:
    """The claim that `mask` `[B, S, L]` is nowhere true; the first place where it is, if not."""
    for at in mask.nonzero()[:1].tolist():
        return False, f"[b, s, l] = {at} {what}: {routes[tuple(at)].tolist()}"
    return True, ""


def trace_ids(record: Record) -> Claims:
    """Ids in [0, E), or -1."""
    low, high = (int(value) for value in record.routes.aminmax())
    yield low >= -1, f"an id of {low}; only -1 may be negative"
    in_range = record.num_experts is None or high < record.num_experts
    yield (
        in_range,
        f"an id of {high} for {record.num_experts} experts: the record is another model's, or has "
        "ids of physical experts, of which some are copies (EPLB), where logical ones belong",
    )


def trace_width(record: Record) -> Claims:
    """Ids of more than 256 experts went through more than 8 bits."""
    experts = record.num_experts or 0
    if experts <= 256:
        yield None, "at most 256 experts, or their number is not known"
        return
    told = int(record.recorded.sum()) * record.routes.shape[-1] * math.log(experts / 256) * OTHERS
    yield (
        int(record.routes.max()) > 255 or told < CHANCE,
        f"no id above 255 of {experts} experts: ids were cut to 8 bits on the way, and those of "
        "higher experts are now of others",
    )


def trace_distinct(record: Record) -> Claims:
    """The K ids of a token differ."""
    routes = record.routes
    if routes.shape[-1] == 1:
        yield None, "one expert per token"
        return
    twice = (record.sets.diff(dim=-1) == 0).any(dim=-1) & record.recorded
    # Tokens and layers of nothing but zeros have checks of their own.
    zero = (routes == 0).all(dim=-1)
    twice &= ~(zero & (zero.all(dim=-1, keepdim=True) | record.zero_layers))
    yield _none_of(twice, "names an expert twice", routes)


def trace_zeros(record: Record) -> Claims:
    """Not everything is expert 0: an engine that recorded nothing hands over zeros."""
    routes = record.routes
    yield bool((routes > 0).any()), "every recorded id is 0 or -1: the engine recorded nothing"
    # With one expert per token a layer of zeros may be true; all layers at once are a fill.
    zero = record.zero_layers & (routes.shape[-1] > 1)
    yield (
        not bool(zero.any()),
        f"layers {zero.nonzero().flatten().tolist()} are all zeros: dense layers, if the record "
        "holds every decoder layer (fit_to_model drops them), else layers that were not recorded",
    )


def trace_last_token(record: Record) -> Claims:
    """No token is filled with zeros; the last one, which is never fed, is where it happens."""
    filled = (record.routes == 0).flatten(2).all(dim=-1).nonzero().tolist()
    yield (
        not filled,
        f"{len(filled)} tokens are zeros in every layer, the first at [b, s] = "
        f"{(filled or [[]])[0]}: rows without a route (the last token, padding) must hold -1, or "
        "expert 0 gets load that it never had",
    )


def fillers(record: Record) -> Tensor:
    """bool `[B, S]`: tokens with 0, 1, ..., K - 1 in every layer, where that can be no choice.

    NeMo-RL and others fill rows without a route so, because K ids must differ. A router that likes
    these experts likes them for many tokens: only their number in all layers and their order tell.
    """
    routes = record.routes
    layers, top_k = routes.shape[2:]
    filled = (routes == torch.arange(top_k, device=routes.device)).flatten(2).all(dim=-1)
    if record.choices == 0 or top_k == 1:
        return torch.zeros_like(filled)
    told = layers * (record.choices + math.lgamma(top_k + 1))
    # One token, wherever it stands, is one trial; unknown tokens may all be one.
    if record.tokens is None or len(record.tokens[filled].unique()) < MIN_TOKENS:
        told -= math.log(filled.numel())
    return filled if told >= CHANCE else torch.zeros_like(filled)


def trace_fillers(record: Record) -> Claims:
    """No token is filled with the experts 0 to K - 1."""
    filled = fillers(record).nonzero().tolist()
    yield (
        not filled,
        f"{len(filled)} tokens hold 0..K-1 in every layer, the first at [b, s] = "
        f"{(filled or [[]])[0]}: rows without a route that were filled; they must hold -1",
    )


def trace_gaps(record: Record) -> Claims:
    """A token at a layer has K ids or none."""
    some = (record.routes >= 0).any(dim=-1) & ~record.recorded
    yield _none_of(some, "has some ids only", record.routes)
    yield bool(record.recorded.any()), "no token has a record"


def trace_lost(record: Record) -> Claims:
    """No row was lost on the way: where response tokens are predicted, or between two others."""
    recorded = record.recorded
    none = ~recorded.flatten(1).any(dim=1)
    if record.response is not None:
        none &= record.response.any(dim=1)
    alone = none.nonzero().flatten().tolist()
    yield not alone, f"{len(alone)} sequences have no record at all, the first is b = {alone[:1]}"
    if record.response is not None:
        lost = record.response.unsqueeze(-1) & ~recorded
        where = "where a response token is predicted"
    else:
        before = recorded.int().cummax(dim=1).values > 0
        behind = recorded.flip(1).int().cummax(dim=1).values.flip(1) > 0
        lost, where = before & behind & ~recorded, "between recorded ones"
    found = lost.nonzero()
    yield (
        not len(found),
        f"{len(found)} (token, layer) pairs have no record {where}, the first at [b, s, l] = "
        f"{found[:1].flatten().tolist()}: a replay would choose live there. Give the engine more "
        "memory, so that it preempts no request and evicts no record",
    )


def trace_layers(record: Record) -> Claims:
    """No two layers are copies of each other."""
    tokens = record.sets[record.whole]
    if tokens.shape[0] < MIN_TOKENS:
        yield None, "fewer than four tokens with every layer"
        return
    dense = record.num_experts == record.routes.shape[-1]  # a control uses every expert everywhere
    head = tokens[:256]  # nearly all pairs differ there, and there may be a thousand
    for a, b in combinations(range(tokens.shape[1]), 2):
        copied = torch.equal(head[:, a], head[:, b]) and torch.equal(tokens[:, a], tokens[:, b])
        copied = copied and bool((tokens[:, a] != 0).any())
        yield dense or not copied, f"layer {b} is a copy of layer {a}"


def trace_tokens(record: Record) -> Claims:
    """Tokens do not all go to the same experts, in a sequence, in all, or at one layer."""
    sets, whole = record.sets, record.whole
    tokens = sets[whole]
    if tokens.shape[0] < MIN_TOKENS or record.num_experts == record.routes.shape[-1]:
        yield None, "fewer than four tokens, or every expert is always on"
        return
    yield (
        bool((tokens != tokens[:1]).any()),
        "every token goes to the same experts in every layer: one row was written over and over",
    )
    counted = whole if record.response is None else whole & record.response
    pairs = counted[:, 1:] & counted[:, :-1] & ~record.same_token()
    moved = (sets[:, 1:] != sets[:, :-1]).flatten(2).any(dim=-1) & pairs
    told = int(pairs.sum()) * sets.shape[2] * record.choices * NEIGHBOURS
    yield (
        bool(moved.any()) or told < CHANCE,
        "no sequence sends two different tokens of it to different experts: one row was written "
        "over and over in each",
    )
    one = (tokens == tokens[:1]).all(dim=-1).all(dim=0) & ~record.zero_layers
    told = (tokens.shape[0] - 1) * record.choices * OTHERS - math.log(sets.shape[2])
    yield (
        not bool(one.any()) or told < CHANCE or _one_token(record),
        f"layers {one.nonzero().flatten().tolist()} send every token to the same experts: one row "
        "was written over and over there",
    )


def _one_token(record: Record) -> bool:
    """Whether too few different tokens were routed to tell a constant layer from an honest one."""
    if record.tokens is None:
        return False
    return int(record.tokens[record.whole].unique().numel()) < MIN_TOKENS


def trace_runs(record: Record) -> Claims:
    """No row stands in a run of tokens: a buffer that an engine did not fill keeps the last one."""
    routes, whole = record.routes, record.whole
    pairs = whole[:, 1:] & whole[:, :-1] & ~record.same_token()
    equal = (routes[:, 1:] == routes[:, :-1]).flatten(2).all(dim=-1) & pairs
    if record.choices == 0 or not bool(equal.any()):
        return
    # Length of the run that ends at each pair: its position less that of the last unequal one.
    place = torch.arange(1, equal.shape[1] + 1, device=equal.device).expand(equal.shape)
    length = place - place.masked_fill(equal, 0).cummax(dim=1).values
    longest = int(length.max())
    b, end = divmod(int(length.argmax()), equal.shape[1])
    # How often neighbours agree elsewhere in this record, if that is more.
    others = int(pairs.sum()) - longest
    often = (int(equal.sum()) - longest + 1) / (others + 2)
    each = min(routes.shape[2] * record.choices * NEIGHBOURS, -math.log(often))
    told = longest * each - math.log(max(others, 1))
    yield (
        longest + 1 < MIN_TOKENS or told < CHANCE,
        f"{longest + 1} tokens from [b, s] = [{b}, {end + 1 - longest}] hold one row in every layer"
        ": it was written over and over, or the text repeats one token",
    )


def trace_passes(record: Record) -> Claims:
    """No sequence is recorded twice, block after block or row by row, as by recomputation."""
    for b, (routes, whole) in enumerate(zip(record.routes, record.whole, strict=True)):
        rows = routes[whole].flatten(1)
        length = len(rows)
        told = length / 2 * routes.shape[1] * record.choices * NEIGHBOURS
        if length < 2 * MIN_TOKENS or told < CHANCE:
            continue
        half = length // 2
        yield (
            not torch.equal(rows[:half], rows[half:]),
            f"sequence {b}: its last {half} rows are its first {half} once more: each router was "
            "recorded twice, as by activation recomputation",
        )
        yield (
            not torch.equal(rows[: 2 * half : 2], rows[1 : 2 * half : 2]),
            f"sequence {b}: each of its {half} rows stands there twice: each router was recorded "
            "twice in a forward",
        )


def trace_turns(record: Record) -> Claims:
    """A later turn's prompt begins with the tokens of the turn that it goes on from, all of them.

    A chat template or a tokenizer that reads a turn's text anew may write other tokens than the
    engine sampled and routed. Then the text goes on as it was sampled after some other tokens: a
    prompt that does not come back to the response goes on from another sample, or a part of it.
    """
    tokens, response = record.tokens, record.response
    if tokens is None or response is None:
        yield None, "the record does not say which tokens are of prompts and of responses"
        return
    place = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    ends = (place * response).amax(dim=1) + 1  # the token that the last row predicts
    prompts = torch.where(response.any(dim=1), response.int().argmax(dim=1) + 1, ends)
    sums = _prefix_sums(tokens)
    # Of a later turn the one before it: tokens of its prompt, tokens that agree, its number.
    before: dict[int, tuple[int, int, int]] = {}
    for i, (prompt, end) in enumerate(zip(prompts.tolist(), ends.tolist(), strict=True)):
        later = (prompts >= end) & (sums[:, prompt - 1] == sums[i, prompt - 1]) & (end > prompt)
        for j in later.nonzero().flatten().tolist():
            same = int((tokens[i, :end] == tokens[j, :end]).int().cumprod(dim=0).sum())
            before[j] = max(before.get(j, (0, 0, 0)), (prompt, same, i))
    for j, (_, at, i) in before.items():
        # The last token, such as the end of a turn, was never fed and has no route.
        sampled, written = tokens[i, at : ends[i] - 1], tokens[j, at : prompts[j]]
        if not _comes_back(sampled.tolist(), written.tolist()):
            continue
        yield (
            False,
            f"the prompt of sequence {j} goes on from sequence {i} and holds token "
            f"{int(tokens[j, at])} at position {at} where {int(tokens[i, at])} was sampled: turns "
            "are tokenised anew, and routes of the one are of other tokens than the other's. Give "
            "the engine the ids of earlier turns, not their text",
        )


def _comes_back(sampled: list[int], written: list[int]) -> bool:
    """Whether two texts that differ at their first token agree again after a few."""
    for a in range(REWRITTEN + 1):
        rest = sampled[a : a + REJOINED]
        if len(rest) == REJOINED and any(
            written[b : b + REJOINED] == rest for b in range(REWRITTEN + 1)
        ):
            return True
    return False


def _prefix_sums(tokens: Tensor) -> Tensor:
    """int64 `[B, S]`: a hash of the tokens up to each place; equal for equal tokens."""
    powers = torch.full_like(tokens[0], 0x9E3779B1).cumprod(dim=0)  # odd, and wraps at 64 bits
    return ((tokens + 2) * powers).cumsum(dim=1)


TRACE_LAWS: dict[str, Callable[[Record], Claims]] = {
    "ids": trace_ids,
    "width": trace_width,
    "distinct": trace_distinct,
    "zeros": trace_zeros,
    "last token": trace_last_token,
    "fillers": trace_fillers,
    "gaps": trace_gaps,
    "lost": trace_lost,
    "layers": trace_layers,
    "tokens": trace_tokens,
    "passes": trace_passes,
    "runs": trace_runs,
    "turns": trace_turns,
}


def check_trace(
    routed_experts: Tensor,
    *,
    num_experts: int | None = None,
    response: Tensor | None = None,
    tokens: Tensor | None = None,
    laws: Collection[str] = TRACE_LAWS,
) -> list[LawResult]:
    """Check routes recorded elsewhere before they are replayed.

    Args:
        routed_experts: `[B, S, L, K]` as `read_trace` returns it.
        num_experts: E; None where it is unknown: ids then have no upper bound.
        response: bool `[B, S]`, where response tokens are predicted; None where it is unknown: then
            rows may only be missing before and behind the others.
        tokens: int64 `[B, S]`, the tokens that were routed; None where they are unknown: then rows
            that are alike cannot be excused by tokens that are.
        laws: keys of `TRACE_LAWS`.

    Raises:
        ValueError: not an integer tensor of four axes, or an empty one.
    """
    routes = routed_experts
    if routes.ndim != 4 or routes.is_floating_point() or routes.numel() == 0:
        raise ValueError(
            f"routed_experts: {routes.dtype} {list(routes.shape)}; pass integer ids [B, S, L, K] "
            "of at least one token"
        )
    record = Record(routes=routes, num_experts=num_experts, response=response, tokens=tokens)
    return [judge_law(name, TRACE_LAWS[name](record)) for name in laws]


def require_information(
    routed_experts: Tensor, *, num_experts: int, response: Tensor, tokens: Tensor
) -> None:
    """Refuse the routes of an engine that `check_trace` finds something wrong with.

    Raises:
        ValueError: names the law that does not hold, and where.
    """
    for finding in check_trace(
        routed_experts, num_experts=num_experts, response=response, tokens=tokens
    ):
        if finding.passed is False:
            raise ValueError(
                f"routed_experts: {finding.reason} (check {finding.check!r} of moe-rl check-replay)"
            )
