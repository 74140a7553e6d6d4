"""Group advantages, and those against a learned value: formulas, limits, bad rewards."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_rl.losses.advantages import gae, group_advantages, whiten


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10**6), prompts=st.integers(1, 5), group=st.integers(2, 9))
def test_advantages_equal_the_formula(seed: int, prompts: int, group: int) -> None:
    rewards = np.random.default_rng(seed).normal(size=(prompts, group))
    expected = (rewards - rewards.mean(1, keepdims=True)) / rewards.std(1, ddof=1, keepdims=True)
    advantages = group_advantages(torch.from_numpy(rewards))
    np.testing.assert_allclose(advantages.numpy(), expected, rtol=1e-9, atol=1e-12)


def test_one_success_in_four() -> None:
    advantages = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    torch.testing.assert_close(advantages, torch.tensor([[1.5, -0.5, -0.5, -0.5]]))
    assert advantages.dtype == torch.float32


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -1e30, 1e-310])
@pytest.mark.parametrize("group", [2, 3, 7])
def test_a_group_of_equal_rewards_is_exactly_zero(value: float, group: int) -> None:
    rewards = torch.full((3, group), value, dtype=torch.float64)
    rewards[1, 0] += 1e30
    advantages = group_advantages(rewards)
    assert torch.equal(advantages[[0, 2]], torch.zeros(2, group, dtype=torch.float64))
    assert advantages[1].any()


@settings(deadline=None)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=64), min_size=2, max_size=8))
def test_finite_rewards_of_any_size_give_finite_advantages(rewards: list[float]) -> None:
    advantages = group_advantages(torch.tensor([rewards], dtype=torch.float64))
    assert advantages.isfinite().all()
    assert abs(advantages.sum().item()) < 1e-9
    spread = advantages.std().item()
    assert spread == 0.0 or math.isclose(spread, 1.0, rel_tol=1e-6)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10**6), scale=st.floats(1e-6, 1e6), shift=st.floats(-10, 10))
def test_the_unit_of_the_reward_does_not_matter(seed: int, scale: float, shift: float) -> None:
    rewards = torch.randn(2, 5, generator=torch.Generator().manual_seed(seed)).double()
    torch.testing.assert_close(
        group_advantages(scale * (rewards + shift)), group_advantages(rewards), rtol=1e-6, atol=1e-6
    )


def test_integer_and_boolean_rewards_are_numbers() -> None:
    expected = group_advantages(torch.tensor([[1.0, 0.0, 1.0]]))
    for dtype in (torch.int64, torch.bool, torch.float16):
        assert torch.equal(group_advantages(torch.tensor([[1, 0, 1]]).to(dtype)), expected)


@pytest.mark.parametrize("shape", [(4,), (2, 2, 2), (4, 1)])
def test_rewards_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"rewards.shape=.*expected \[P, G\].*view"):
        group_advantages(torch.zeros(shape))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_named_by_prompt_and_sample(value: float) -> None:
    rewards = torch.zeros(3, 4)
    rewards[2, 1] = value
    with pytest.raises(ValueError, match=rf"rewards\[2, 1\]={value}.*prompt 2, sample 1"):
        group_advantages(rewards)


def responses(seed: int, count: int = 5, longest: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards [B], values [B, T] and the mask of responses of 1 to T tokens, in float64."""
    rng = np.random.default_rng(seed)
    lengths = torch.from_numpy(rng.integers(1, longest + 1, count))
    mask = torch.arange(longest) < lengths[:, None]
    return (
        torch.from_numpy(rng.normal(size=count)),
        torch.from_numpy(rng.normal(size=(count, longest))),
        mask,
    )


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), lam=st.floats(0.0, 1.0))
def test_gae_is_the_weighted_sum_of_the_errors_that_follow(seed: int, lam: float) -> None:
    """The definition, as one sum a token, where the code goes backwards once."""
    rewards, values, mask = responses(seed)
    found = gae(rewards, values.masked_fill(~mask, math.nan), mask, lam=lam)
    expected = torch.zeros_like(values)
    for i, length in enumerate(mask.sum(1).tolist()):
        said = [*values[i, :length].tolist(), 0.0]
        errors = [said[t + 1] - said[t] for t in range(length)]
        errors[-1] += rewards[i].item()
        for t in range(length):
            expected[i, t] = sum(lam ** (s - t) * errors[s] for s in range(t, length))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_gae_without_bootstrapping_is_the_reward_minus_the_value() -> None:
    rewards, values, mask = responses(0)
    zeros = torch.zeros_like(values)
    expected = torch.where(mask, rewards[:, None], 0.0)
    assert torch.equal(gae(rewards, zeros, mask, lam=1.0), expected)
    torch.testing.assert_close(
        gae(rewards, values, mask, lam=1.0), (expected - values).where(mask, zeros)
    )


def test_a_value_that_foretells_the_reward_leaves_no_advantage() -> None:
    rewards, _, mask = responses(1)
    values = rewards[:, None].expand(mask.shape)
    assert not gae(rewards, values, mask, lam=0.3).any()


def test_whitened_advantages_have_mean_0_and_variance_1_over_the_tokens() -> None:
    _, values, mask = responses(2)
    white = whiten(values.masked_fill(~mask, math.nan), mask)
    assert abs(white[mask].mean().item()) < 1e-12
    assert white[mask].var().item() == pytest.approx(1.0, rel=1e-6)
    assert not white[~mask].any()
    order = values[mask].argsort()
    assert torch.equal(white[mask].argsort(), order)


def test_equal_advantages_and_a_single_one_whiten_to_zero() -> None:
    for shape in ((2, 3), (1, 1)):
        assert not whiten(torch.full(shape, 0.7), torch.ones(shape, dtype=torch.bool)).any()


def test_whitening_counts_the_tokens_of_all_processes() -> None:
    """Two processes with the same rows whiten as one that holds the rows twice."""
    _, values, mask = responses(3)
    both = whiten(values.repeat(2, 1), mask.repeat(2, 1))
    apart = whiten(values, mask, total=lambda own: 2 * own)
    torch.testing.assert_close(apart, both[: len(values)], rtol=1e-12, atol=1e-12)
