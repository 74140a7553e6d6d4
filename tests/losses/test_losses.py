"""Losses: the papers' formulas, the laws between algorithms, padding, extremes, bad input."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_formulas import FORMULAS, Response, numerical_gradient, total
from torch import Tensor

from moe_rl.losses import ALGORITHMS, LossInputs, aggregate, make_inputs
from moe_rl.losses.base import Aggregation

NAMES = list(ALGORITHMS)
AGGREGATIONS: list[Aggregation] = ["sequence_mean", "token_mean", "fixed_length"]
# Ranges in which random data lies inside and outside of every bound.
OPTIONS: dict[str, dict[str, float]] = {
    "gspo": {"clip_low": 0.05, "clip_high": 0.08},
    "gspo_token": {"clip_low": 0.05, "clip_high": 0.08},
    "geo_rs": {"lowest": 0.8, "highest": 1.3},
    "cispo": {"bound": 2.0},
    "dppo_tv": {"bound": 1.5},
}


class Batch(NamedTuple):
    """float64, ragged; the first response is empty and the second has the full length."""

    logprobs: Tensor
    old: Tensor
    rollout: Tensor
    advantages: Tensor
    mask: Tensor
    shift: Tensor
    values: Tensor
    old_values: Tensor
    returns: Tensor

    def rows(self, rows: slice) -> Batch:
        return Batch(*(value[rows] for value in self))


def random_batch(seed: int = 0, batch: int = 12, length: int = 6, spread: float = 0.8) -> Batch:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    old = -3 * torch.rand(batch, length, generator=draw, dtype=torch.float64)
    lengths = torch.randint(1, length + 1, (batch,), generator=draw)
    lengths[0], lengths[1] = 0, length
    return Batch(
        -(old + spread * normal(batch, length)).abs(),
        old,
        -(old + spread * normal(batch, length)).abs(),
        normal(batch),
        torch.arange(length) < lengths[:, None],
        1 - 0.5 * torch.rand(batch, length, generator=draw, dtype=torch.float64),
        *(normal(batch, length) for _ in range(3)),
    )


def inputs_of(batch: Batch) -> LossInputs:
    return make_inputs(
        batch.logprobs,
        batch.old,
        batch.advantages,
        batch.mask,
        rollout_logprobs=batch.rollout,
        router_shift=batch.shift,
        values=batch.values,
        old_values=batch.old_values,
        returns=batch.returns,
    )


def run(
    name: str,
    batch: Batch,
    options: dict[str, float] | None = None,
    how: Aggregation | None = None,
    divisor: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The scalar loss and its gradient in logprobs, by the algorithm's own aggregation or `how`."""
    algorithm = ALGORITHMS[name]
    leaf = batch.logprobs.detach().clone().requires_grad_()
    inputs = inputs_of(batch._replace(logprobs=leaf))
    options = OPTIONS.get(name, {}) if options is None else options
    token_losses = algorithm.loss(inputs, **options)
    assert token_losses.shape == leaf.shape
    loss = aggregate(token_losses, inputs, how or algorithm.aggregation, divisor=divisor)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def assert_same(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("per_token", [False, True])
def test_loss_and_gradient_equal_the_papers_formula(name: str, per_token: bool) -> None:
    batch = random_batch(seed=len(name))
    if per_token:
        draw = torch.Generator().manual_seed(9)
        batch = batch._replace(
            advantages=torch.randn(batch.old.shape, generator=draw, dtype=torch.float64)
        )
    wide = batch.advantages if per_token else batch.advantages[:, None].expand(batch.old.shape)
    options = ALGORITHMS[name].options | OPTIONS.get(name, {})
    held, old, rollout, advantages, mask, *others = (
        value.numpy() for value in batch._replace(advantages=wide)
    )

    def formula(new: Any) -> float:
        losses = []
        for i, keep in enumerate(mask):
            values = (new, held, old, rollout, advantages, *others)
            response = Response(*(value[i][keep].tolist() for value in values))
            losses.append(FORMULAS[name](response, options) if keep.any() else [])
        return total(losses, ALGORITHMS[name].aggregation, budget=mask.shape[1])

    loss, gradient = run(name, batch)
    assert gradient.any()
    np.testing.assert_allclose(loss.item(), formula(held), 1e-12)
    np.testing.assert_allclose(gradient.numpy(), numerical_gradient(formula, held), atol=1e-8)


@pytest.mark.parametrize(
    ("name", "option"), [(name, option) for name in NAMES for option in ALGORITHMS[name].options]
)
def test_every_option_has_a_say(name: str, option: str) -> None:
    """The data of these tests lies on both sides of every bound."""
    batch = random_batch(seed=1, batch=48)
    options = ALGORITHMS[name].options | OPTIONS.get(name, {})
    loss, _ = run(name, batch, options)
    other, _ = run(name, batch, options | {option: options[option] * 1.25})
    assert loss != other


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_aggregations_equal_their_formulas(how: Aggregation) -> None:
    batch = random_batch(3)
    inputs = make_inputs(batch.logprobs, batch.old, batch.advantages, batch.mask)
    rows = [row[keep].tolist() for row, keep in zip(batch.logprobs, batch.mask, strict=True)]
    # Padding of the token losses may hold anything: a loss need not clear it.
    token_losses = batch.logprobs.masked_fill(~batch.mask, math.nan)
    loss = aggregate(token_losses, inputs, how)
    assert loss.item() == pytest.approx(total(rows, how, budget=6), rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_on_policy_gradient_is_the_policy_gradient(name: str) -> None:
    batch = random_batch()
    batch = batch._replace(
        old=batch.logprobs, rollout=batch.logprobs, shift=torch.ones_like(batch.shift)
    )
    _, gradient = run(name, batch, {})
    how = ALGORITHMS[name].aggregation
    if name == "positive_only":
        batch = batch._replace(advantages=batch.advantages.clamp(min=0))
    _, expected = run("policy_gradient", batch, {}, how)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)
    divisor = {
        "sequence_mean": len(batch.mask) * batch.mask.sum(1, keepdim=True).clamp(min=1),
        "token_mean": batch.mask.sum(),
        "fixed_length": batch.mask.numel(),
    }[how]
    torch.testing.assert_close(
        expected, torch.where(batch.mask, -batch.advantages[:, None] / divisor, 0.0)
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_correction_of_the_engine_is_a_no_op_where_engine_and_trainer_agree(name: str) -> None:
    """And no other loss is one: what `weighs_engine` says, and `moe-rl train` warns by."""
    batch = random_batch()
    expected = run("grpo", batch)
    agreed = run(name, batch._replace(rollout=batch.old))
    if ALGORITHMS[name].weighs_engine:
        assert_same(agreed, expected)
        with pytest.raises(AssertionError):
            assert_same(run(name, batch), expected)
    elif ALGORITHMS[name].loss is not ALGORITHMS["grpo"].loss:
        with pytest.raises(AssertionError):
            assert_same(agreed, expected)


def test_each_bound_is_a_no_op_inside_it() -> None:
    batch = random_batch()
    small = random_batch(spread=0.3)
    assert (small.logprobs - small.old)[small.mask].max() < math.log(3)
    assert_same(run("dual_clip", small), run("grpo", small))
    assert_same(run("dual_clip", batch, {"bound": math.inf}), run("grpo", batch))
    assert_same(run("cispo", small, {}), run("cispo", small, {"bound": math.inf}))
    still = batch._replace(shift=torch.ones_like(batch.shift))
    assert_same(run("rspo", still), run("gmpo", still))
    positive = batch._replace(advantages=batch.advantages.abs())
    assert_same(run("positive_only", positive), run("grpo", positive))
    # No probability moves by more than 1, so that nothing is left of the mask.
    free = run("dppo_tv", batch, {"distance": 1.0, "bound": math.inf}, "token_mean")
    assert_same(free, run("cispo", batch, {"bound": math.inf}))


@pytest.mark.parametrize("clip", [(0.2, 0.27), (3e-4, 4e-4), (0.0, 0.0)])
def test_on_one_token_responses_sequence_ratios_are_token_ratios(
    clip: tuple[float, float],
) -> None:
    batch = random_batch(batch=24)
    batch = batch._replace(mask=batch.mask & (torch.arange(6) == 0))
    options = {"clip_low": clip[0], "clip_high": clip[1]}
    expected = run("grpo", batch, options)
    assert_same(run("gspo", batch, options), expected)
    assert_same(run("gspo_token", batch, options), expected)
    wide = {"clip_low": 1 - math.exp(-0.4), "clip_high": math.exp(0.4) - 1}
    assert_same(run("gmpo", batch), run("grpo", batch, wide))


@settings(max_examples=50)
@given(seed=st.integers(0, 10**6), spread=st.floats(0.0, 3.0), length=st.integers(1, 9))
def test_gspo_token_equals_gspo_with_one_advantage_a_response(
    seed: int, spread: float, length: int
) -> None:
    batch = random_batch(seed, length=length, spread=spread)
    assert_same(run("gspo_token", batch), run("gspo", batch))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e38])
def test_padding_never_counts(name: str, garbage: float) -> None:
    batch = random_batch()
    wide = batch._replace(advantages=batch.advantages[:, None].expand(batch.old.shape))
    loss, gradient = run(name, wide)
    for field in set(Batch._fields) - {"mask"}:
        dirty = getattr(wide, field).masked_fill(~batch.mask, garbage)
        other, theirs = run(name, wide._replace(**{field: dirty}))
        assert torch.equal(other, loss) and torch.equal(theirs, gradient), field
    assert not gradient[~batch.mask].any()


@settings(max_examples=100)
@given(
    seed=st.integers(0, 10**6),
    cut=st.integers(1, 11),
    name=st.sampled_from(NAMES),
    how=st.sampled_from(AGGREGATIONS),
)
def test_parts_of_a_minibatch_add_up_to_the_whole(
    seed: int, cut: int, name: str, how: Aggregation
) -> None:
    batch = random_batch(seed)
    whole, expected = run(name, batch, how=how)
    tokens = batch.mask.sum().item()
    divisor = {"sequence_mean": 12, "token_mean": tokens, "fixed_length": 12 * 6}[how]
    parts = [
        run(name, batch.rows(rows), how=how, divisor=divisor)
        for rows in (slice(0, cut), slice(cut, None))
    ]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole)
    torch.testing.assert_close(torch.cat([gradient for _, gradient in parts]), expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", AGGREGATIONS)
def test_an_empty_sequence_adds_nothing_and_counts_in_a_mean_over_sequences(
    name: str, how: Aggregation
) -> None:
    batch = random_batch()
    assert not batch.mask[0].any() and batch.mask[1:].any(1).all()
    whole, gradient = run(name, batch, how=how)
    present, _ = run(name, batch.rows(slice(1, None)), how=how)
    torch.testing.assert_close(whole, present * (1.0 if how == "token_mean" else 11 / 12))
    assert not gradient[0].any()
    nobody, zeros = run(name, batch._replace(mask=torch.zeros_like(batch.mask)), how=how)
    assert nobody == 0 and not zeros.any()


UNBOUNDED = {"grpo", "dr_grpo", "dapo", "ppo", "tis", "mis", "geo_rs", "icepop", "gmpo", "rspo"}
UNBOUNDED |= {"gspo", "gspo_token"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("log_ratio", [200.0, 1e30, -200.0, -math.inf])
@pytest.mark.parametrize("log_rho", [0.0, 200.0, -200.0])
def test_extreme_ratios_never_make_a_nan(name: str, log_ratio: float, log_rho: float) -> None:
    """In float32, where e^200 is inf."""
    zeros = torch.zeros(3, 4)
    mask = torch.ones(3, 4, dtype=torch.bool)
    first = (zeros + log_ratio, zeros, zeros - log_rho, zeros[:, 0], mask, zeros + 0.9)
    batch = Batch(*first, *[zeros] * 3)
    loss, gradient = run(name, batch._replace(advantages=torch.tensor([1.0, 0.0, 0.5])), {})
    assert gradient.isfinite().all() and not loss.isnan()
    # Without a ratio the loss is the log-prob itself.
    assert loss.isfinite() or (name == "policy_gradient" and math.isinf(log_ratio))
    loss, gradient = run(name, batch._replace(advantages=-torch.ones(3)), {})
    assert not loss.isnan() and not gradient.isnan().any()
    if name not in UNBOUNDED:
        assert gradient.isfinite().all()
    elif log_rho == 0.0:
        # The papers leave a bad response's growing ratio unclipped.
        assert loss.isposinf() == (log_ratio > 0)


def test_a_ratio_that_over_and_underflows_is_one_ratio() -> None:
    """The trainer gives a token e^-200 in the old pass alone: w is inf, rho is 0, w rho is 1."""
    zeros = torch.zeros(2, 3)
    mask = torch.ones(2, 3, dtype=torch.bool)
    batch = Batch(zeros, zeros - 200, zeros, -torch.ones(2), mask, zeros + 1, *[zeros] * 3)
    for name in ("tis", "mis"):
        loss, gradient = run(name, batch._replace(old=batch.old if name == "tis" else zeros))
        torch.testing.assert_close(loss, torch.tensor(1.0))
        torch.testing.assert_close(gradient, torch.full((2, 3), 1 / 6))


@pytest.mark.parametrize("name", NAMES)
def test_gradient_reaches_logprobs_and_values_alone(name: str) -> None:
    batch = Batch(*(x.requires_grad_() if x.is_floating_point() else x for x in random_batch()))
    inputs = inputs_of(batch)
    ALGORITHMS[name].loss(inputs, **OPTIONS.get(name, {})).sum().backward()
    assert batch.logprobs.grad is not None and batch.logprobs.grad.any()
    learnt = {field for field in Batch._fields if getattr(batch, field).grad is not None}
    assert learnt == {"logprobs"} | ({"values"} if ALGORITHMS[name].learns_value else set())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_inputs_are_summed_in_float32(name: str, dtype: torch.dtype) -> None:
    rounded = Batch(
        *(x.to(dtype) if x.is_floating_point() else x for x in random_batch(spread=0.4))
    )
    loss, gradient = run(name, rounded)
    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    exact, _ = run(name, Batch(*(x.double() if x.is_floating_point() else x for x in rounded)))
    torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logprobs": torch.zeros(6)}, r"logprobs.shape=\[6\]: expected \[B, T\]"),
        ({"old_logprobs": torch.zeros(6)}, r"old_logprobs.shape=\[6\]: expected \[12, 6\]"),
        ({"rollout_logprobs": torch.zeros(12, 1)}, r"rollout_logprobs.shape=\[12, 1\]: expected"),
        ({"router_shift": torch.zeros(12)}, r"router_shift.shape=\[12\]: expected \[12, 6\]"),
        ({"values": torch.zeros(12, 1)}, r"values.shape=\[12, 1\]: expected \[12, 6\]"),
        ({"returns": torch.zeros(12)}, r"returns.shape=\[12\]: expected \[12, 6\]"),
        ({"advantages": torch.zeros(12, 1)}, r"advantages.shape=\[12, 1\]: .*, \[12\]"),
        ({"mask": torch.ones(12, 6)}, r"mask.dtype=torch.float32.*mask.bool\(\)"),
        ({"mask": torch.ones(12, 1, dtype=torch.bool)}, r"mask.shape=\[12, 1\]"),
    ],
)
def test_bad_input_names_the_argument_and_the_fix(change: dict[str, Any], message: str) -> None:
    batch = random_batch()
    arguments: dict[str, Any] = {
        "logprobs": batch.logprobs,
        "old_logprobs": batch.old,
        "advantages": batch.advantages,
        "mask": batch.mask,
    }
    make_inputs(**arguments)
    with pytest.raises(ValueError, match=message):
        make_inputs(**(arguments | change))
