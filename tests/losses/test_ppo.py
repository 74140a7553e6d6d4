"""PPO's loss: its formula, its parts, its padding, and verl's functions where they import."""

import math
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from moe_rl.losses import LossInputs, aggregate, make_inputs
from moe_rl.losses.advantages import gae, whiten
from moe_rl.losses.ppo import ppo_loss, value_loss

CLIP, VALUE_CLIP, COEF = 0.2, 0.2, 0.1


def problem(seed: int = 0, size: int = 12, length: int = 6) -> tuple[LossInputs, Tensor, Tensor]:
    """Inputs in float64, and their leaves: log-probs and values."""
    rng = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(size, length, generator=rng, dtype=torch.float64)  # noqa: E731
    lengths = torch.randint(1, length + 1, (size, 1), generator=rng)
    logprobs, values = draw().requires_grad_(), draw().requires_grad_()
    inputs = make_inputs(
        logprobs,
        logprobs.detach() + 0.3 * draw(),
        draw(),
        torch.arange(length) < lengths,
        values=values,
        old_values=values.detach() + 0.3 * draw(),
        returns=draw(),
    )
    return inputs, logprobs, values


def by_hand(inputs: LossInputs) -> float:
    """Mean over tokens of the formula, in plain Python."""
    total, count = 0.0, 0
    for i, t in inputs.mask.nonzero().tolist():
        at = {
            field.name: getattr(inputs, field.name)[i, t].item()
            for field in fields(inputs)
            if getattr(inputs, field.name) is not None
        }
        ratio, advantage = math.exp(at["logprobs"] - at["old_logprobs"]), at["advantages"]
        clipped = min(max(ratio, 1 - CLIP), 1 + CLIP)
        value, old, target = at["values"], at["old_values"], at["returns"]
        near = min(max(value, old - VALUE_CLIP), old + VALUE_CLIP)
        miss = max((value - target) ** 2, (near - target) ** 2) / 2
        total += COEF * miss - min(ratio * advantage, clipped * advantage)
        count += 1
    return total / count


@pytest.mark.parametrize("seed", range(3))
def test_ppo_and_its_gradients_equal_the_formula(seed: int) -> None:
    inputs, logprobs, values = problem(seed)
    loss = aggregate(ppo_loss(inputs), inputs, "token_mean")
    assert loss.item() == pytest.approx(by_hand(inputs), rel=1e-12)
    found = torch.autograd.grad(loss, (logprobs, values))
    for name, gradient in zip(("logprobs", "values"), found, strict=True):
        plain = getattr(inputs, name).detach()
        for place in ((0, 0), (3, 1), (7, 2)):
            moved = torch.zeros_like(plain)
            moved[place] = 1e-6
            there, here = (
                by_hand(replace(inputs, **{name: plain + sign * moved})) for sign in (1, -1)
            )
            expected = (there - here) / 2e-6 if inputs.mask[place] else 0.0
            assert gradient[place].item() == pytest.approx(expected, abs=1e-8), (name, place)


def test_parts_of_a_minibatch_add_up_to_the_whole() -> None:
    inputs, logprobs, values = problem(4)
    whole = aggregate(ppo_loss(inputs), inputs, "token_mean")
    total = float(inputs.mask.sum())
    tensors = {
        field.name: getattr(inputs, field.name)
        for field in fields(inputs)
        if getattr(inputs, field.name) is not None
    }
    parts = []
    for rows in (slice(0, 5), slice(5, None)):
        part = make_inputs(**{name: tensor[rows] for name, tensor in tensors.items()})
        parts.append(aggregate(ppo_loss(part), part, "token_mean", divisor=total))
    torch.testing.assert_close(parts[0] + parts[1], whole)
    expected = torch.autograd.grad(whole, (logprobs, values), retain_graph=True)
    found = torch.autograd.grad(parts[0] + parts[1], (logprobs, values))
    torch.testing.assert_close(found, expected)


def test_padding_never_counts_in_values() -> None:
    inputs, _, values = problem(5)
    pad = ~inputs.mask
    assert pad.any()
    dirty = make_inputs(
        inputs.logprobs,
        inputs.old_logprobs,
        inputs.advantages,
        inputs.mask,
        values=values.masked_fill(pad, math.nan),
        old_values=inputs.old_values.masked_fill(pad, math.inf),  # type: ignore[union-attr]
        returns=inputs.returns.masked_fill(pad, math.nan),  # type: ignore[union-attr]
    )
    losses = [aggregate(ppo_loss(i), i, "token_mean") for i in (inputs, dirty)]
    assert torch.equal(*losses)
    gradients = [torch.autograd.grad(loss, values)[0] for loss in losses]
    assert torch.equal(*gradients)


def test_a_value_beyond_its_clip_pulls_only_where_it_moved_away_from_the_return() -> None:
    old, returns = torch.zeros(1, 4), torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    values = torch.tensor([[0.5, 0.5, 0.1, 0.1]], requires_grad=True)
    value_loss(values, old, returns, 0.2).sum().backward()
    expected = torch.tensor([[0.0, 1.5, -0.9, 1.1]])  # V - R, and 0 where the clipped one is worse
    torch.testing.assert_close(values.grad, expected)


def test_advantages_and_value_loss_are_those_of_verl() -> None:
    core = pytest.importorskip("verl.trainer.ppo.core_algos")
    inputs, _, _ = problem(6)
    mask, values, returns = inputs.mask.double(), inputs.old_values, inputs.returns
    assert values is not None and returns is not None and inputs.values is not None
    rewards = inputs.advantages[:, 0]
    last = inputs.mask.sum(1, keepdim=True) - 1
    at_end = torch.zeros_like(values).scatter(1, last, rewards[:, None])
    theirs, targets = core.compute_gae_advantage_return(at_end, values, mask, 1.0, 0.9)
    ours = gae(rewards, values, inputs.mask, lam=0.9)
    torch.testing.assert_close((ours + values)[inputs.mask], targets[inputs.mask])
    torch.testing.assert_close(whiten(ours, inputs.mask)[inputs.mask], theirs[inputs.mask])
    expected, _ = core.compute_value_loss(inputs.values, returns, values, mask, VALUE_CLIP)
    found = value_loss(inputs.values, values, returns, VALUE_CLIP)
    torch.testing.assert_close(aggregate(found, inputs, "token_mean"), expected)
