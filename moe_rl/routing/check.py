"""Routing room: the independent checker of record and replay on a model.

    for finding in check_replay(model): print(finding)

Each check is one law. What a law is held against comes from elsewhere than the taps: bitwise
equality of outputs and gradients, what the experts are called with, the formula of the family,
and finite differences.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .experts_watch import Seen, watch_experts
from .gate_formula import Formula
from .record import record_routing
from .replay import replay_routing
from .routed_experts import check_routed_experts
from .taps import RouterTap, find_routers

BATCH, LENGTH = 3, 9
# Attention over a cache sums in another order; a near tie in live routing may flip, hence not 0.
TOLERANCE_OF_CACHE = 1e-3


class LawBroken(AssertionError):
    """A law does not hold; the message says where and by how much."""


class NotApplicable(Exception):
    """The law says nothing about this model; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The outcome of one check."""

    check: str
    """Name of the law, a key of `LAWS`."""
    passed: bool | None
    """None: not applicable."""
    reason: str
    """What is wrong, or why the law does not apply; empty where it holds."""


class Subject:
    """A model under check: its inputs, and what it does when nobody is watching."""

    def __init__(self, model: nn.Module, formula: Formula | None, seed: int) -> None:
        self.model: Any = model
        self.formula = formula
        self.taps = find_routers(model)
        config: Any = model.config
        self.config = config.get_text_config()
        self.generator = torch.Generator().manual_seed(seed)
        device = next(model.parameters()).device
        self.tokens = torch.randint(
            2, self.config.vocab_size, (BATCH, LENGTH), generator=self.generator
        ).to(device)
        self.plain = self.output()
        self.pull = torch.randn(self.plain.shape, generator=self.generator).to(device)

    @property
    def tap(self) -> RouterTap:
        """Any of the routers: they agree in E and K."""
        return self.taps[0]

    def output(self, tokens: Tensor | None = None, **inputs: Any) -> Tensor:
        """Logits `[B, S, V]` without gradients, or the hidden states of a model without a head."""
        with torch.no_grad():
            return self.forward(tokens, **inputs)

    def forward(self, tokens: Tensor | None = None, **inputs: Any) -> Tensor:
        """The same with gradients."""
        inputs.setdefault("use_cache", False)
        out = self.model(input_ids=self.tokens if tokens is None else tokens, **inputs)
        return out.logits if "logits" in out else out.last_hidden_state

    def loss(self) -> Tensor:
        """A scalar that depends on every output."""
        return (self.forward().float() * self.pull).sum() / self.pull.numel()

    def gradient(self) -> dict[str, Tensor]:
        """Gradients by name, taken off the model."""
        found = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad(set_to_none=True)
        return found

    def record(self) -> Tensor:
        """The model's own routes `[B, S, L, K]`."""
        with record_routing(self.model) as recorded:
            self.output()
        return recorded.routed_experts

    def foreign(self) -> Tensor:
        """Random routes `[B, S, L, K]`, different within a token."""
        shape = (BATCH, LENGTH, len(self.taps), self.tap.num_experts)
        draws = torch.rand(shape, generator=self.generator)
        return draws.topk(self.tap.top_k, dim=-1).indices.to(torch.int16)

    def router_parameters(self, tap: RouterTap) -> list[nn.Parameter]:
        """The parameters that score experts; those of the experts of a tapped block are not."""
        named = tap.module.named_parameters()
        return [p for name, p in named if p.requires_grad and not name.startswith("experts.")]


def require(holds: bool, message: str) -> None:
    """Raise LawBroken unless a law holds."""
    if not holds:
        raise LawBroken(message)


def law_record(subject: Subject) -> None:
    """Recording changes nothing; every token, the last too, has K different ids in range."""
    with record_routing(subject.model) as recorded, watching(subject) as seen:
        watched = subject.output()
    require(torch.equal(watched, subject.plain), "recording changes the output")
    routes, tap = recorded.routed_experts, subject.tap
    expected = (BATCH, LENGTH, len(subject.taps), tap.top_k)
    require(routes.shape == expected, f"the record is {list(routes.shape)}, not {list(expected)}")
    gaps = (routes < 0).any(dim=-1).nonzero().tolist()
    require(not gaps, f"no record at [b, s, l] = {gaps[:1]}")
    check_routed_experts(
        routes, num_layers=len(subject.taps), num_experts=tap.num_experts, top_k=tap.top_k
    )
    _require_used(subject, seen, routes)


def law_replay(subject: Subject) -> None:
    """A model that replays its own record gives the same bits: outputs and all gradients."""
    routes = subject.record()
    subject.loss().backward()
    expected = subject.gradient()
    with replay_routing(subject.model, routes) as replayed:
        again = subject.output()
        subject.loss().backward()
    require(torch.equal(again, subject.plain), _difference("outputs", again, subject.plain))
    got = subject.gradient()
    for name, value in expected.items():
        require(name in got, f"no gradient for {name}")
        require(torch.equal(got[name], value), _difference(name, got[name], value))
    live = replayed.live_routed_experts
    require(_same_sets(live, routes), "the live choice under replay is not the record")


def law_foreign(subject: Subject) -> None:
    """Foreign ids are what the experts are called with."""
    routes = subject.foreign()
    with replay_routing(subject.model, routes), watching(subject) as seen:
        moved = subject.output()
    require(not torch.equal(moved, subject.plain), "foreign ids do not move the output")
    if not seen:
        raise NotApplicable("these experts are not called with ids and weights")
    _require_used(subject, seen, routes)


def law_weights(subject: Subject) -> None:
    """The gate weights of foreign ids are the formula's, from all E scores."""
    if subject.formula is None:
        raise NotApplicable("no formula is written down for this router")
    try:
        with record_routing(subject.model, scores=True):
            subject.output()
    except ValueError as error:  # the law `record` has passed without logits
        raise NotApplicable(str(error)) from error
    routes = subject.foreign()
    with (
        replay_routing(subject.model, routes, scores=True) as replayed,
        watching(subject) as seen,
    ):
        subject.output()
    if not seen:
        raise NotApplicable("these experts are not called with ids and weights")
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
        require(
            error <= tolerance * scale,
            f"layer {layer}: gate weights are {error:.1e} from {subject.formula}",
        )


def law_gradient(subject: Subject) -> None:
    """Every router learns under replay, and its gradient is the slope that finite steps find."""
    routes = subject.foreign()
    with replay_routing(subject.model, routes):
        subject.loss().backward()
    parameters, steps, slope = [], [], 0.0
    for tap in subject.taps:
        own = [p for p in subject.router_parameters(tap) if p.grad is not None]
        largest = max((float(p.grad.abs().max()) for p in own if p.grad is not None), default=0.0)
        require(0 < largest < float("inf"), f"router {tap.name} gets no gradient ({largest})")
        parameters += own
    for p in parameters:
        assert p.grad is not None
        noise = torch.randn(p.shape, generator=subject.generator).to(p)
        # Along the gradient, so that the step is seen above rounding; off it, to see what lacks.
        step = p.grad / (p.grad.norm() + 1e-30) + 0.5 * noise / noise.norm()
        steps.append(step * (p.detach().norm() + 1e-3))
        slope += float((p.grad.double() * steps[-1].double()).sum())
    subject.gradient()
    found = _slope_by_steps(subject, routes, parameters, steps)
    require(
        abs(found - slope) <= 0.05 * abs(slope),
        f"the routers' gradient says {slope:.4g} where a finite step finds {found:.4g}",
    )


def _slope_by_steps(
    subject: Subject, routes: Tensor, parameters: list[nn.Parameter], steps: list[Tensor]
) -> float:
    epsilon, values = 2e-3, []
    before = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for sign in (1.0, -1.0):
            for p, old, step in zip(parameters, before, steps, strict=True):
                p.copy_(old + sign * epsilon * step)
            with replay_routing(subject.model, routes):
                out = subject.output().double()
            values.append(float((out * subject.pull).sum()) / subject.pull.numel())
        for p, old in zip(parameters, before, strict=True):
            p.copy_(old)
    return (values[0] - values[1]) / (2 * epsilon)


def law_gaps(subject: Subject) -> None:
    """-1 means live; a record of zeros, of twice the same id or of an id too large is refused."""
    own, routes = subject.record(), subject.foreign()
    with replay_routing(subject.model, torch.full_like(own, -1)):
        require(torch.equal(subject.output(), subject.plain), "an empty record is not live")
    mixed = routes.clone()
    mixed[1] = -1
    with replay_routing(subject.model, mixed), record_routing(subject.model) as used:
        subject.output()
    got = used.routed_experts
    require(torch.equal(got[0], routes[0]), "a recorded row is not replayed beside one without")
    # The same numbers in a batch may differ in the last bit, and so may a near tie.
    require(_share_equal(got[1], own[1]) > 0.9, "a row without a record is not live")
    bad = {"zeros": torch.zeros_like(own), "an id too large": own + subject.tap.num_experts}
    if subject.tap.top_k > 1:
        bad["an id twice"] = own[..., :1].expand_as(own)
    for what, record in bad.items():
        try:
            with replay_routing(subject.model, record):
                pass
        except ValueError:
            continue
        raise LawBroken(f"a record of {what} is not refused")


def law_padding(subject: Subject) -> None:
    """Padded rows record and replay; what is replayed at padding does not reach the tokens."""
    mask = torch.ones_like(subject.tokens)
    mask[1, :4] = mask[2, :2] = 0
    with record_routing(subject.model) as recorded:
        plain = subject.output(attention_mask=mask)
    if bool(plain.isnan().any()):
        raise NotApplicable("without replay its output is NaN where there is padding")
    routes = recorded.routed_experts
    with replay_routing(subject.model, routes):
        require(
            torch.equal(subject.output(attention_mask=mask), plain),
            "replaying a padded batch changes the output",
        )
    routes[mask.cpu() == 0] = -1
    with replay_routing(subject.model, routes):
        again = subject.output(attention_mask=mask)
    kept = mask.bool()
    require(torch.equal(again[kept], plain[kept]), "-1 at padding changes the tokens")


def law_cache(subject: Subject) -> None:
    """A prefill and steps of a cache take the rows of the record that a whole forward takes."""
    routes = subject.foreign()
    own = _relative(_last_through_cache(subject), subject.plain[:, -1])
    if own > TOLERANCE_OF_CACHE:
        raise NotApplicable(f"without replay its cache is {own:.1e} from a whole pass already")
    with replay_routing(subject.model, routes):
        whole = subject.output()
    with replay_routing(subject.model, routes), record_routing(subject.model) as used:
        last = _last_through_cache(subject)
    require(torch.equal(used.routed_experts, routes), "steps of a cache lose their place")
    error = _relative(last, whole[:, -1])
    require(error < TOLERANCE_OF_CACHE, f"through a cache it is {error:.1e} from a whole pass")


def _last_through_cache(subject: Subject) -> Tensor:
    """The output at the last position, by a prefill and two steps: `[B, V]`."""
    with torch.no_grad():
        first = subject.model(input_ids=subject.tokens[:, :-2], use_cache=True)
    cache = getattr(first, "past_key_values", None)
    if cache is None:
        raise NotApplicable("the model returns no cache")
    for step in subject.tokens[:, -2:].split(1, dim=1):
        last = subject.output(step, past_key_values=cache, use_cache=True)
    return last[:, -1]


def _relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / (expected.abs().max() + 1e-30))


def law_checkpointing(subject: Subject) -> None:
    """Gradient checkpointing of both kinds, backward outside the block, changes no gradient."""
    model = subject.model
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise NotApplicable("the model supports no gradient checkpointing")
    prefix = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    routes, was_training = subject.foreign(), model.training
    model.train()
    try:
        expected = _replayed_gradient(subject, routes)
        for reentrant in (True, False):
            getattr(model, f"{prefix}_checkpointing_enable")({"use_reentrant": reentrant})
            got = _replayed_gradient(subject, routes)
            getattr(model, f"{prefix}_checkpointing_disable")()
            for name, value in expected.items():
                kind = "reentrant" if reentrant else "non-reentrant"
                require(name in got, f"{kind}: no gradient for {name}")
                close = torch.allclose(got[name], value, rtol=1e-3, atol=1e-5)
                require(close, f"{kind}: " + _difference(name, got[name], value))
    finally:
        model.train(was_training)


def _replayed_gradient(subject: Subject, routes: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(0)  # dropout and jitter, where a model has them in training
    with replay_routing(subject.model, routes):
        loss = subject.loss()
    loss.backward()
    return subject.gradient()


def law_bf16(subject: Subject) -> None:
    """In bfloat16 too, replaying one's own record changes no bit."""
    half = copy.copy(subject)
    half.model = copy.deepcopy(subject.model).to(torch.bfloat16)
    half.taps = find_routers(half.model)
    try:
        half.plain = half.output()
    except RuntimeError as error:
        raise NotApplicable(f"without replay it does not run in bfloat16: {error}") from error
    routes = half.record()
    with replay_routing(half.model, routes):
        again = half.output()
    require(torch.equal(again, half.plain), _difference("outputs", again, half.plain))


LAWS: dict[str, Callable[[Subject], None]] = {
    "record": law_record,
    "replay": law_replay,
    "foreign": law_foreign,
    "weights": law_weights,
    "gradient": law_gradient,
    "gaps": law_gaps,
    "padding": law_padding,
    "cache": law_cache,
    "checkpointing": law_checkpointing,
    "bf16": law_bf16,
}


def check_replay(
    model: nn.Module, *, formula: Formula | None = None, seed: int = 0
) -> list[Finding]:
    """Hold record and replay on `model` against every law.

    The model is used in eval mode with random tokens, on its own device and in its own type; its
    weights, gradients (cleared) and mode are afterwards as before.

    Args:
        model: a model that `find_routers` accepts.
        formula: the gate weights of its routers; None leaves the law `weights` out.
        seed: seed of tokens and foreign routes.

    Raises:
        ValueError: the model has no router that can be recorded, see `find_routers`.
    """
    was_training = model.training
    subject = Subject(model.eval(), formula, seed)
    try:
        return [_find(name, law, subject) for name, law in LAWS.items()]
    finally:
        model.train(was_training)


def _find(name: str, law: Callable[[Subject], None], subject: Subject) -> Finding:
    try:
        law(subject)
    except NotApplicable as why:
        return Finding(check=name, passed=None, reason=str(why))
    except LawBroken as broken:
        return Finding(check=name, passed=False, reason=str(broken))
    except (ValueError, RuntimeError) as error:
        # What a model or a tap raises under a law is a finding about it.
        return Finding(check=name, passed=False, reason=f"{type(error).__name__}: {error}")
    finally:
        subject.model.zero_grad(set_to_none=True)
    return Finding(check=name, passed=True, reason="")


def watching(subject: Subject) -> Any:
    """What the experts of the subject are called with."""
    return watch_experts(subject.model, subject.taps)


def _require_used(subject: Subject, seen: Seen, routes: Tensor) -> None:
    for layer, (used, weights) in seen.items():
        expected = routes[:, :, layer].reshape(-1, subject.tap.top_k).to(used)
        differs = (used.sort(dim=-1).values != expected.sort(dim=-1).values) & (weights != 0)
        require(
            not bool(differs.any()),
            f"layer {layer}: experts are called with {used[differs.any(-1)][:1].tolist()}, the "
            f"record says {expected[differs.any(-1)][:1].tolist()}",
        )


def _same_sets(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.sort(dim=-1).values, b.sort(dim=-1).values)


def _share_equal(a: Tensor, b: Tensor) -> float:
    same = (a.sort(dim=-1).values == b.sort(dim=-1).values).all(dim=-1)
    return float(same.float().mean())


def _difference(name: str, got: Tensor, expected: Tensor) -> str:
    return f"{name}: {_relative(got, expected):.1e} from the same without replay"
