"""Replay check: laws of what is recorded and what is replayed, for `check.py`."""

import torch
from torch import Tensor

from moe_rl.replay_check.check_subject import (
    BATCH,
    LENGTH,
    Subject,
    difference,
    experts_got,
    relative,
    sort_ids,
)
from moe_rl.replay_check.claims import Claims
from moe_rl.replay_check.experts_watch import watch_experts
from moe_rl.routing.record import record_routing
from moe_rl.routing.replay import replay_routing
from moe_rl.routing.routed_experts import check_routed_experts

# Attention over a cache sums in another order; a near tie in live routing may flip, hence not 0.
TOLERANCE_OF_CACHE = 1e-3


def law_record(subject: Subject) -> Claims:
    """Recording changes nothing; every token, the last too, has K different ids in range."""
    with (
        record_routing(subject.model) as recorded,
        watch_experts(subject.model, subject.taps) as seen,
    ):
        watched = subject.output()
    yield torch.equal(watched, subject.plain), "recording changes the output"
    routes, tap = recorded.routed_experts, subject.tap
    expected = (BATCH, LENGTH, len(subject.taps), tap.top_k)
    yield routes.shape == expected, f"the record is {list(routes.shape)}, not {list(expected)}"
    gaps = (routes < 0).any(dim=-1).nonzero().tolist()
    yield not gaps, f"no record at [b, s, l] = {gaps[:1]}"
    check_routed_experts(
        routes, num_layers=len(subject.taps), num_experts=tap.num_experts, top_k=tap.top_k
    )
    yield from experts_got(subject, seen, routes)


def law_replay(subject: Subject) -> Claims:
    """A model that replays its own record gives the same bits: outputs and all gradients."""
    routes = subject.record()
    subject.loss().backward()
    expected = subject.gradient()
    with replay_routing(subject.model, routes) as replayed:
        again = subject.output()
        subject.loss().backward()
    yield torch.equal(again, subject.plain), difference("outputs", again, subject.plain)
    got = subject.gradient()
    for name, value in expected.items():
        yield name in got, f"no gradient for {name}"
        yield torch.equal(got[name], value), difference(name, got[name], value)
    same = torch.equal(sort_ids(replayed.live_routed_experts), sort_ids(routes))
    yield same, "the live choice under replay is not the record"


def law_foreign(subject: Subject) -> Claims:
    """Foreign ids are what the experts are called with."""
    if subject.tap.top_k == subject.tap.num_experts:
        yield None, "every expert is always on"
        return
    routes = subject.foreign()
    with replay_routing(subject.model, routes), watch_experts(subject.model, subject.taps) as seen:
        moved = subject.output()
    yield not torch.equal(moved, subject.plain), "foreign ids do not move the output"
    if not seen:
        yield None, "these experts are not called with ids and weights"
        return
    yield from experts_got(subject, seen, routes)


def law_weights(subject: Subject) -> Claims:
    """The gate weights of foreign ids are the formula's, from all E scores."""
    if subject.formula is None:
        yield None, "no formula is written down for this router"
        return
    try:
        with record_routing(subject.model, router_logits=True):
            subject.output()
    except ValueError as why:  # the law `record` has passed without logits
        yield None, str(why)
        return
    routes = subject.foreign()
    with (
        replay_routing(subject.model, routes, router_logits=True) as replayed,
        watch_experts(subject.model, subject.taps) as seen,
    ):
        subject.output()
    if not seen:
        yield None, "these experts are not called with ids and weights"
        return
    for layer, (used, weights) in seen.items():
        ids = routes[:, :, layer].reshape(-1, subject.tap.top_k).long().to(used.device)
        logits = replayed.router_logits[:, :, layer].flatten(0, 1).double()
        expected = subject.formula.weights(logits, ids, subject.config)
        by_id = torch.zeros_like(logits).scatter(-1, ids, expected).gather(-1, used)
        # A choice that has no weights (Zaya's skip expert) is masked after the router.
        skipped = (used != ids) & (weights == 0)
        error = (weights.double() - by_id).masked_fill(skipped, 0).abs().max().item()
        scale = max(1.0, expected.abs().max().item())
        tolerance = 1e-5 if weights.dtype == torch.float32 else 2e-2
        yield (
            error <= tolerance * scale,
            f"layer {layer}: gate weights are {error:.1e} from {subject.formula}",
        )


def law_gaps(subject: Subject) -> Claims:
    """-1 means live; a record of zeros, of twice the same id or of an id too large is refused."""
    own, routes = subject.record(), subject.foreign()
    with replay_routing(subject.model, torch.full_like(own, -1)):
        live = subject.output()
    yield torch.equal(live, subject.plain), "an empty record is not live"
    mixed = routes.clone()
    mixed[1] = -1
    with replay_routing(subject.model, mixed), record_routing(subject.model) as used:
        subject.output()
    got = used.routed_experts
    yield torch.equal(got[0], routes[0]), "a recorded row is not replayed beside one without"
    # The same numbers in a batch may differ in the last bit, and so may a near tie.
    kept = (sort_ids(got[1]) == sort_ids(own[1])).all(dim=-1).float().mean()
    yield bool(kept > 0.9), "a row without a record is not live"
    bad = {"an id too large": own + subject.tap.num_experts}
    if subject.tap.num_experts > 1:
        bad["zeros"] = torch.zeros_like(own)
    if subject.tap.top_k > 1:
        bad["an id twice"] = own[..., :1].expand_as(own)
    for what, record in bad.items():
        try:
            with replay_routing(subject.model, record):
                refused = False
        except ValueError:
            refused = True
        yield refused, f"a record of {what} is not refused"


def law_padding(subject: Subject) -> Claims:
    """Padded rows record and replay; what is replayed at padding does not reach the tokens."""
    mask = torch.ones_like(subject.tokens)
    mask[1, :4] = mask[2, :2] = 0
    with record_routing(subject.model) as recorded:
        plain = subject.output(attention_mask=mask)
    if bool(plain.isnan().any()):
        yield None, "without replay its output is NaN where there is padding"
        return
    routes = recorded.routed_experts
    with replay_routing(subject.model, routes):
        again = subject.output(attention_mask=mask)
    yield torch.equal(again, plain), "replaying a padded batch changes the output"
    routes[mask.cpu() == 0] = -1
    with replay_routing(subject.model, routes):
        again = subject.output(attention_mask=mask)
    kept = mask.bool()
    yield torch.equal(again[kept], plain[kept]), "-1 at padding changes the tokens"


def law_cache(subject: Subject) -> Claims:
    """A prefill and steps of a cache take the rows of the record that a whole forward takes."""
    routes = subject.foreign()
    last = _last_through_cache(subject)
    if last is None:
        yield None, "the model returns no cache"
        return
    own = relative(last, subject.plain[:, -1])
    if own > TOLERANCE_OF_CACHE:
        yield None, f"without replay its cache is {own:.1e} from a whole pass already"
        return
    with replay_routing(subject.model, routes):
        whole = subject.output()
    with replay_routing(subject.model, routes), record_routing(subject.model) as used:
        last = _last_through_cache(subject)
    assert last is not None
    yield torch.equal(used.routed_experts, routes), "steps of a cache lose their place"
    error = relative(last, whole[:, -1])
    yield error < TOLERANCE_OF_CACHE, f"through a cache it is {error:.1e} from a whole pass"


def _last_through_cache(subject: Subject) -> Tensor | None:
    """The output at the last position, by a prefill and two steps: `[B, V]`; None: no cache."""
    with torch.no_grad():
        first = subject.model(input_ids=subject.tokens[:, :-2], use_cache=True)
    cache = getattr(first, "past_key_values", None)
    if cache is None:
        return None
    for step in subject.tokens[:, -2:].split(1, dim=1):
        last = subject.output(step, past_key_values=cache, use_cache=True)
    return last[:, -1]
