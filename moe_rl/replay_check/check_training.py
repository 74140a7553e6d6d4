"""Replay check: laws of training under replay: gradients, recomputation, bfloat16."""

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_rl.policy.folder import as_loaded
from moe_rl.replay_check.check_subject import Subject, difference
from moe_rl.replay_check.claims import Claims
from moe_rl.routing.replay import replay_routing
from moe_rl.routing.taps import find_routers


def law_gradient(subject: Subject) -> Claims:
    """Every router learns under replay, and its gradient is the slope that finite steps find."""
    if subject.tap.top_k == 1 and not _routers_learn(subject):
        yield None, "without replay, too, its routers' gradient is 0: one expert's weight"
        return
    routes = subject.foreign()
    with replay_routing(subject.model, routes):
        subject.loss().backward()
    parameters, steps, slope = [], [], 0.0
    for tap in subject.taps:
        own = [(p, p.grad) for p in subject.router_parameters(tap) if p.grad is not None]
        largest = max((float(grad.abs().max()) for _, grad in own), default=0.0)
        yield 0 < largest < float("inf"), f"router {tap.name} gets no gradient ({largest})"
        parameters += own
    if any(p.dtype.itemsize < 4 for p, _ in parameters):
        yield (
            None,
            f"there is one; finite steps of {parameters[0][0].dtype} weights are too coarse for "
            "its size (`replay` compares every gradient with that without replay)",
        )
        return
    for p, grad in parameters:
        noise = torch.randn(p.shape, generator=subject.generator).to(p)
        # Along the gradient, so that the step is seen above rounding; off it, to see what lacks.
        step = grad / (grad.norm() + 1e-30) + 0.5 * noise / noise.norm()
        steps.append(step * (p.detach().norm() + 1e-3))
        slope += float((grad.double() * steps[-1].double()).sum())
    subject.gradient()
    found = _slope_by_steps(subject, routes, [p for p, _ in parameters], steps)
    yield (
        abs(found - slope) <= 0.05 * abs(slope),
        f"the routers' gradient says {slope:.4g} where a finite step finds {found:.4g}",
    )


def _routers_learn(subject: Subject) -> bool:
    """Whether any router has a gradient above rounding when nothing is replayed."""
    subject.loss().backward()
    routers = [p.grad for tap in subject.taps for p in subject.router_parameters(tap)]
    own = max((float(grad.abs().max()) for grad in routers if grad is not None), default=0.0)
    return own > 1e-5 * max(float(grad.abs().max()) for grad in subject.gradient().values())


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


def law_checkpointing(subject: Subject) -> Claims:
    """Gradient checkpointing of both kinds, backward outside the block, changes no gradient."""
    model = subject.model
    if not getattr(model, "supports_gradient_checkpointing", False):
        yield None, "the model supports no gradient checkpointing"
        return
    prefix = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    routes, was_training = subject.foreign(), model.training
    model.train()
    try:
        expected = _replayed_gradient(subject, routes)
        for kind in ("reentrant", "non-reentrant"):
            options = {"use_reentrant": kind == "reentrant"}
            getattr(model, f"{prefix}_checkpointing_enable")(options)
            got = _replayed_gradient(subject, routes)
            getattr(model, f"{prefix}_checkpointing_disable")()
            for name, value in expected.items():
                yield name in got, f"{kind}: no gradient for {name}"
                close = torch.allclose(got[name], value, rtol=1e-3, atol=1e-5)
                yield close, f"{kind}: " + difference(name, got[name], value)
    finally:
        model.train(was_training)


def _replayed_gradient(subject: Subject, routes: Tensor) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)  # dropout and jitter, where a model has them in training
        with replay_routing(subject.model, routes):
            loss = subject.loss()
        loss.backward()
    return subject.gradient()


def law_bf16(subject: Subject) -> Claims:
    """In bfloat16 too, replaying one's own record changes no bit."""
    half = copy.copy(subject)
    if isinstance(subject.model, PreTrainedModel):
        half.model = as_loaded(subject.model, torch.bfloat16).eval()
    else:
        half.model = copy.deepcopy(subject.model).to(torch.bfloat16)
    half.taps = find_routers(half.model)
    try:
        half.plain = half.output()
    except RuntimeError as why:
        yield None, f"without replay it does not run in bfloat16: {why}"
        return
    routes = half.record()
    with replay_routing(half.model, routes):
        again = half.output()
    yield torch.equal(again, half.plain), difference("outputs", again, half.plain)
