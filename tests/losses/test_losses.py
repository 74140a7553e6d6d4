"""Losses: the papers' formulas, the laws between algorithms, padding, clip accounting."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from moe_rl.losses import (
    ALGORITHMS,
    LossOutput,
    grpo_loss,
    gspo_loss,
    gspo_token_loss,
    loss_function,
    resolve_clip,
)

Array = NDArray[np.float64]
ALGORITHM_NAMES = sorted(ALGORITHMS)
# Wide enough that random data has clipped and unclipped tokens under every algorithm.
CLIPS = {"grpo": (0.2, 0.27), "gspo": (0.05, 0.08), "gspo_token": (0.05, 0.08)}


def random_batch(
    seed: int = 0, batch: int = 12, length: int = 7, spread: float = 0.4
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprobs (a leaf), old_logprobs, advantages, mask: float64, ragged, the first one empty."""
    draw = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(batch, length, generator=draw, dtype=torch.float64)
    new = old + spread * torch.randn(batch, length, generator=draw, dtype=torch.float64)
    advantages = torch.randn(batch, generator=draw, dtype=torch.float64)
    lengths = torch.randint(1, length + 1, (batch,), generator=draw)
    lengths[0], lengths[1] = 0, length
    mask = torch.arange(length) < lengths[:, None]
    return new.requires_grad_(), old, advantages, mask


def run(
    algorithm: str, batch: tuple[Tensor, ...], num_sequences: int | None = None
) -> tuple[LossOutput, Tensor]:
    """The loss and its gradient in logprobs."""
    logprobs, old, advantages, mask = batch
    leaf = logprobs.detach().clone().requires_grad_()
    low, high = CLIPS[algorithm]
    output = loss_function(algorithm)(
        leaf, old, advantages, mask, clip_low=low, clip_high=high, num_sequences=num_sequences
    )
    (gradient,) = torch.autograd.grad(output.loss, leaf)
    return output, gradient


def clipped_objective(ratio: float, advantage: float, low: float, high: float) -> float:
    return min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)


def reference_grpo(new: Array, old: Array, advantages: Array, mask: Array) -> float:
    """Equations 2-3, one loop a sum."""
    low, high = CLIPS["grpo"]
    total = 0.0
    for i in range(len(new)):
        terms = [
            clipped_objective(math.exp(new[i, t] - old[i, t]), advantages[i], low, high)
            for t in range(new.shape[1])
            if mask[i, t]
        ]
        total += sum(terms) / len(terms) if terms else 0.0
    return -total / len(new)


def reference_gspo(new: Array, old: Array, advantages: Array, mask: Array) -> float:
    """Equations 5-7, with the ratio as the |y|-th root of a ratio of likelihoods."""
    low, high = CLIPS["gspo"]
    total = 0.0
    for i in range(len(new)):
        tokens = [t for t in range(new.shape[1]) if mask[i, t]]
        if not tokens:
            continue
        likelihood = math.prod(math.exp(new[i, t]) for t in tokens)
        old_likelihood = math.prod(math.exp(old[i, t]) for t in tokens)
        ratio = (likelihood / old_likelihood) ** (1 / len(tokens))
        total += clipped_objective(ratio, advantages[i], low, high)
    return -total / len(new)


def reference_gspo_token_gradient(new: Array, old: Array, advantages: Array, mask: Array) -> Array:
    """Equation 17's sum, written as the gradient of each log-prob: -s_i A_it / (N |y_i|)."""
    low, high = CLIPS["gspo_token"]
    gradient = np.zeros_like(new)
    for i in range(len(new)):
        tokens = [t for t in range(new.shape[1]) if mask[i, t]]
        if not tokens:
            continue
        ratio = math.exp(sum(new[i, t] - old[i, t] for t in tokens) / len(tokens))
        for t in tokens:
            a = advantages[i, t]
            clipped = ratio > 1 + high if a > 0 else ratio < 1 - low
            if not clipped:
                gradient[i, t] = -ratio * a / len(tokens) / len(new)
    return gradient


def numerical_gradient(function: Callable[[Array], float], at: Array, step: float = 1e-6) -> Array:
    gradient = np.zeros_like(at)
    for index in np.ndindex(*at.shape):
        shift = np.zeros_like(at)
        shift[index] = step
        gradient[index] = (function(at + shift) - function(at - shift)) / (2 * step)
    return gradient


@pytest.mark.parametrize(
    ("algorithm", "reference"),
    [("grpo", reference_grpo), ("gspo", reference_gspo), ("gspo_token", reference_gspo)],
)
@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradient_equal_the_papers_formula(
    algorithm: str, reference: Callable[..., float], seed: int
) -> None:
    batch = random_batch(seed, batch=24)
    output, gradient = run(algorithm, batch)
    new, old, advantages, mask = (x.detach().numpy() for x in batch)
    assert output.clipped_low.any() and output.clipped_high.any()
    np.testing.assert_allclose(output.loss.item(), reference(new, old, advantages, mask), 1e-12)
    expected = numerical_gradient(lambda x: reference(x, old, advantages, mask), new)
    np.testing.assert_allclose(gradient.numpy(), expected, atol=1e-9)


def test_gspo_token_with_token_advantages_follows_its_gradient_formula() -> None:
    new, old, _, mask = random_batch(3)
    advantages = torch.randn(new.shape, generator=torch.Generator().manual_seed(1)).double()
    output, gradient = run("gspo_token", (new, old, advantages, mask))
    expected = reference_gspo_token_gradient(
        *(x.detach().numpy() for x in (new, old, advantages, mask))
    )
    np.testing.assert_allclose(gradient.numpy(), expected, atol=1e-15)
    # Signs differ within a sequence, and so does the clip.
    assert ((output.clipped_low | output.clipped_high).any(1) != mask.any(1)).any()


@pytest.mark.parametrize("algorithm", ALGORITHM_NAMES)
def test_on_policy_gradient_is_the_policy_gradient(algorithm: str) -> None:
    new, _, advantages, mask = random_batch()
    output, gradient = run(algorithm, (new, new.detach(), advantages, mask))
    lengths = mask.sum(1, keepdim=True).clamp(min=1)
    policy_gradient = torch.where(mask, -advantages[:, None] / lengths / len(new), 0.0)
    torch.testing.assert_close(gradient, policy_gradient, rtol=1e-14, atol=0)
    present = mask.any(1)
    torch.testing.assert_close(output.loss.detach(), -(advantages * present).sum() / len(new))
    assert not output.clipped_low.any() and not output.clipped_high.any()


@pytest.mark.parametrize("clip", [(0.2, 0.27), (3e-4, 4e-4), (0.0, 0.0)])
def test_gspo_on_one_token_responses_equals_grpo_with_the_same_clip(
    clip: tuple[float, float],
) -> None:
    new, old, advantages, _ = random_batch(spread=0.5)
    mask = torch.zeros(new.shape, dtype=torch.bool)
    mask[1:, 0] = True
    results = []
    for function in (grpo_loss, gspo_loss, gspo_token_loss):
        output = function(
            new, old, advantages, mask, clip_low=clip[0], clip_high=clip[1], num_sequences=12
        )
        (gradient,) = torch.autograd.grad(output.loss, new)
        results.append((output.loss, gradient, output.clipped_low, output.clipped_high))
    for other in results[1:]:
        for ours, theirs in zip(results[0], other, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10**6), spread=st.floats(0.0, 3.0), length=st.integers(1, 9))
def test_gspo_token_equals_gspo_in_loss_gradient_and_clip(
    seed: int, spread: float, length: int
) -> None:
    batch = random_batch(seed, length=length, spread=spread)
    ours, gradient = run("gspo_token", batch)
    theirs, expected = run("gspo", batch)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(ours.clipped_low, theirs.clipped_low)
    assert torch.equal(ours.clipped_high, theirs.clipped_high)


def test_gspo_token_repeats_a_sequence_advantage_over_its_tokens_but_not_its_padding() -> None:
    new, old, advantages, mask = random_batch()
    once, gradient = run("gspo_token", (new, old, advantages, mask))
    wide = advantages[:, None].expand(new.shape).masked_fill(~mask, math.nan)
    each, expected = run("gspo_token", (new, old, wide, mask))
    assert torch.equal(once.loss, each.loss) and torch.equal(gradient, expected)


@pytest.mark.parametrize("algorithm", ALGORITHM_NAMES)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e38])
def test_padding_never_counts(algorithm: str, garbage: float) -> None:
    new, old, advantages, mask = random_batch()
    clean, expected = run(algorithm, (new, old, advantages, mask))
    dirty_advantages = advantages.masked_fill(~mask.any(1), garbage)
    padded = [x.detach().masked_fill(~mask, garbage) for x in (new, old)]
    for inputs in ((padded[0], old), (new, padded[1]), padded):
        dirty, gradient = run(algorithm, (*inputs, dirty_advantages, mask))
        assert torch.equal(dirty.loss, clean.loss) and torch.equal(gradient, expected)
        assert not (dirty.clipped_low & ~mask).any() and not (dirty.clipped_high & ~mask).any()
    assert torch.equal(expected[~mask], torch.zeros_like(expected[~mask]))


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10**6), cut=st.integers(1, 11), algorithm=st.sampled_from(ALGORITHM_NAMES)
)
def test_parts_of_a_minibatch_add_up_to_the_whole(seed: int, cut: int, algorithm: str) -> None:
    batch = random_batch(seed)
    whole, expected = run(algorithm, batch)
    parts = [
        run(algorithm, tuple(x[rows] for x in batch), num_sequences=12)
        for rows in (slice(0, cut), slice(cut, None))
    ]
    torch.testing.assert_close(parts[0][0].loss + parts[1][0].loss, whole.loss)
    torch.testing.assert_close(torch.cat([g for _, g in parts]), expected)


@pytest.mark.parametrize("algorithm", ALGORITHM_NAMES)
def test_an_empty_sequence_adds_nothing_and_counts_in_the_divisor(algorithm: str) -> None:
    batch = random_batch()
    assert not batch[3][0].any() and batch[3][1:].any(1).all()
    whole, gradient = run(algorithm, batch)
    present, _ = run(algorithm, tuple(x[1:] for x in batch))
    torch.testing.assert_close(whole.loss, present.loss * 11 / 12)
    assert not gradient[0].any()
    nobody, zeros = run(algorithm, (*batch[:3], torch.zeros_like(batch[3])))
    assert nobody.loss == 0 and not zeros.any()


@pytest.mark.parametrize("algorithm", ALGORITHM_NAMES)
def test_clip_masks_mark_the_tokens_without_gradient(algorithm: str) -> None:
    batch = random_batch(5)
    output, gradient = run(algorithm, batch)
    removed = output.clipped_low | output.clipped_high
    assert removed.any() and not (output.clipped_low & output.clipped_high).any()
    assert torch.equal(removed, (gradient == 0) & batch[3])


def test_clip_counts_only_where_the_min_picks_the_clipped_branch() -> None:
    ratios = torch.tensor([[0.5, 2.0, 1.0], [0.5, 2.0, 1.0], [0.5, 2.0, 1.0]])
    advantages = torch.tensor([1.0, -1.0, 0.0])
    mask = torch.ones(3, 3, dtype=torch.bool)
    output = grpo_loss(ratios.log(), torch.zeros(3, 3), advantages, mask)
    assert output.clipped_high.tolist() == [[False, True, False], [False] * 3, [False] * 3]
    assert output.clipped_low.tolist() == [[False] * 3, [True, False, False], [False] * 3]


def test_gspo_clips_whole_sequences() -> None:
    batch = random_batch(2)
    output, _ = run("gspo", batch)
    removed, mask = output.clipped_low | output.clipped_high, batch[3]
    assert torch.equal(removed, removed.any(1, keepdim=True) & mask)


@pytest.mark.parametrize("algorithm", ALGORITHM_NAMES)
@pytest.mark.parametrize("log_ratio", [200.0, 1e30, -200.0, -math.inf])
def test_extreme_ratios_never_make_a_nan(algorithm: str, log_ratio: float) -> None:
    new = torch.full((3, 4), log_ratio)
    mask = torch.ones(3, 4, dtype=torch.bool)
    output, gradient = run(algorithm, (new, torch.zeros(3, 4), torch.tensor([1.0, 0.0, 0.5]), mask))
    assert output.loss.isfinite() and gradient.isfinite().all()
    assert not gradient.any()
    output, gradient = run(algorithm, (new, torch.zeros(3, 4), -torch.ones(3), mask))
    assert not output.loss.isnan() and not gradient.isnan().any()
    # The papers leave a bad response's growing ratio unclipped: the loss is then unbounded.
    assert output.loss.isposinf() == (log_ratio > 0)


@pytest.mark.parametrize("algorithm", ALGORITHM_NAMES)
def test_gradient_reaches_logprobs_alone(algorithm: str) -> None:
    new, old, advantages, mask = random_batch()
    old.requires_grad_()
    advantages.requires_grad_()
    loss_function(algorithm)(new, old, advantages, mask).loss.backward()
    assert new.grad is not None and old.grad is None and advantages.grad is None


@pytest.mark.parametrize("algorithm", ALGORITHM_NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_inputs_are_summed_in_float32(algorithm: str, dtype: torch.dtype) -> None:
    new, old, advantages, mask = random_batch()
    rounded = (new.detach().to(dtype), old.to(dtype), advantages.to(dtype), mask)
    output, gradient = run(algorithm, rounded)
    assert output.loss.dtype == torch.float32 and gradient.dtype == dtype
    exact, _ = run(algorithm, (*(x.double() for x in rounded[:3]), mask))
    torch.testing.assert_close(output.loss.double(), exact.loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("algorithm", ALGORITHM_NAMES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logprobs": torch.zeros(7)}, r"logprobs.shape=\[7\]: expected \[B, T\]"),
        ({"old_logprobs": torch.zeros(7)}, r"old_logprobs.shape=\[7\]: expected \[12, 7\]"),
        ({"advantages": torch.zeros(12, 1)}, r"advantages.shape=\[12, 1\]: .*, \[12\]"),
        ({"mask": torch.ones(12, 7)}, r"mask.dtype=torch.float32.*mask.bool\(\)"),
        ({"mask": torch.ones(12, 1, dtype=torch.bool)}, r"mask.shape=\[12, 1\]"),
        ({"clip_low": 1.5}, "clip_low=1.5.*from 0 to 1"),
        ({"clip_high": math.nan}, "clip_high=nan"),
    ],
)
def test_bad_input_names_the_argument_and_the_fix(
    algorithm: str, change: dict[str, object], message: str
) -> None:
    names = ("logprobs", "old_logprobs", "advantages", "mask")
    arguments: dict[str, object] = dict(zip(names, random_batch(), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        loss_function(algorithm)(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("function", [grpo_loss, gspo_loss])
def test_token_advantages_are_refused_where_a_sequence_has_one(
    function: Callable[..., LossOutput],
) -> None:
    new, old, _, mask = random_batch()
    with pytest.raises(ValueError, match="gspo_token"):
        function(new, old, torch.zeros(new.shape), mask)


def test_algorithms_are_found_by_name_and_a_typo_gets_the_nearest() -> None:
    assert loss_function("grpo") is grpo_loss and loss_function("gspo_token") is gspo_token_loss
    with pytest.raises(ValueError, match="algorithm='gspo-token': unknown; use one of grpo"):
        loss_function("gspo-token")
    with pytest.raises(ValueError, match="use one of grpo"):
        resolve_clip("grpox")


def test_default_clips_are_the_papers_and_those_of_the_functions() -> None:
    assert resolve_clip("grpo") == (0.2, 0.27)
    assert resolve_clip("gspo") == resolve_clip("gspo_token") == (3e-4, 4e-4)
    batch = random_batch(spread=0.01)
    for name in ALGORITHM_NAMES:
        low, high = resolve_clip(name)
        implied = loss_function(name)(*batch)
        named = loss_function(name)(*batch, clip_low=low, clip_high=high)
        assert torch.equal(implied.clipped_low, named.clipped_low)
        assert torch.equal(implied.loss, named.loss)


@pytest.mark.parametrize("algorithm", ALGORITHM_NAMES)
def test_every_default_clip_passes_its_own_check_and_fails_the_others(algorithm: str) -> None:
    assert resolve_clip(algorithm, *resolve_clip(algorithm)) == resolve_clip(algorithm)
    other = "gspo" if algorithm == "grpo" else "grpo"
    with pytest.raises(ValueError, match=r"clip_low=.*0\.2 and 0\.27.*3e-4 and 4e-4"):
        resolve_clip(algorithm, *resolve_clip(other))
    low, high = resolve_clip(other)
    assert resolve_clip(algorithm, low, high, allow_any_scale=True) == (low, high)
    with pytest.raises(ValueError, match="clip_high"):
        resolve_clip(algorithm, resolve_clip(algorithm)[0], high)


def test_allowing_any_scale_still_refuses_an_impossible_range() -> None:
    with pytest.raises(ValueError, match=r"clip_low=-0\.1"):
        resolve_clip("grpo", -0.1, 0.2, allow_any_scale=True)
