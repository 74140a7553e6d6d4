"""Ratio statistics against NumPy, their extremes, and the split of the log-ratio variance."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_rl.losses import find_algorithm, make_inputs
from moe_rl.metrics.ratios import (
    SURVIVAL,
    clip_shares,
    gate_statistics,
    mismatch_statistics,
    ratio_statistics,
    ratio_tail,
    split_log_ratio,
)


def random_batch(
    seed: int = 0, batch: int = 9, length: int = 6, spread: float = 0.5
) -> tuple[Tensor, Tensor, Tensor]:
    """logprobs, old_logprobs, mask; ragged, the first sequence empty, garbage in padding."""
    draw = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(batch, length, generator=draw, dtype=torch.float64)
    new = old + spread * torch.randn(batch, length, generator=draw, dtype=torch.float64)
    lengths = torch.randint(1, length + 1, (batch,), generator=draw)
    lengths[0] = 0
    mask = torch.arange(length) < lengths[:, None]
    return new.masked_fill(~mask, math.nan), old.masked_fill(~mask, math.inf), mask


def constant(log_ratios: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """One token a sequence, with these log ratios."""
    new = torch.tensor(log_ratios, dtype=torch.float64)[:, None]
    return new, torch.zeros_like(new), torch.ones_like(new, dtype=torch.bool)


def gradient_of(
    algorithm: str, new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, **options: float
) -> Tensor:
    new = new.clone().requires_grad_()
    inputs = make_inputs(new, old, advantages, mask)
    find_algorithm(algorithm).loss(inputs, **options).where(mask, 0.0).sum().backward()
    assert new.grad is not None
    return new.grad


def describe(log_ratios: np.ndarray, prefix: str) -> dict[str, float]:
    ratios = np.exp(log_ratios)
    p01, p99 = np.quantile(log_ratios, [0.01, 0.99])
    return {
        f"{prefix}_log_mean": log_ratios.mean(),
        f"{prefix}_log_var": log_ratios.var(),
        f"{prefix}_log_p01": p01,
        f"{prefix}_log_p99": p99,
        f"{prefix}_log_max": log_ratios.max(),
        f"{prefix}_var": ratios.var(),
        f"{prefix}_ess": 1 / (1 + ratios.var() / ratios.mean() ** 2),
    }


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    spread=st.sampled_from([1e-4, 0.1, 1.0, 5.0]),
    batch=st.integers(2, 12),
    length=st.integers(1, 8),
)
def test_statistics_equal_numpy(seed: int, spread: float, batch: int, length: int) -> None:
    new, old, mask = random_batch(seed, batch, length, spread)
    rows = [(new[i][mask[i]] - old[i][mask[i]]).numpy() for i in range(batch) if mask[i].any()]
    tokens = np.concatenate(rows)
    ratios = np.exp(tokens)
    expected = describe(tokens, "ratio/token")
    expected |= describe(np.array([row.mean() for row in rows]), "ratio/sequence")
    expected |= {
        "ratio/extreme_2": np.mean(np.maximum(ratios, 1 / ratios) > 2),
        "ratio/extreme_5": np.mean(np.maximum(ratios, 1 / ratios) > 5),
        "ratio/mean": ratios.mean(),
        **{f"ratio/survival_{t}": np.mean(ratios > t) for t in SURVIVAL},
        "kl": -tokens.mean(),
        "kl_k3": np.mean(ratios - 1 - tokens),
    }
    found = ratio_statistics(new, old, mask)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-8, atol=1e-13, err_msg=key)


def test_values_are_plain_floats() -> None:
    values = ratio_statistics(*random_batch()).values()
    assert all(type(value) is float for value in values)


def test_on_policy_ratios_are_one() -> None:
    new, _, mask = random_batch()
    statistics = ratio_statistics(new, new, mask)
    ones = {"ratio/mean", "ratio/token_ess", "ratio/sequence_ess"}
    assert {key for key, value in statistics.items() if value == 1.0} == ones
    assert all(value == 0.0 for key, value in statistics.items() if key not in ones)


def test_sequence_ratio_is_the_one_gspo_clips_by() -> None:
    new, old, mask = random_batch(batch=2)
    largest = ratio_statistics(new, old, mask)["ratio/sequence_log_max"]
    bound = math.expm1(largest)  # the second sequence is the only one with a token
    for clip_high, clipped in ((bound - 1e-9, True), (bound + 1e-9, False)):
        gradient = gradient_of("gspo", new, old, torch.ones(2), mask, clip_high=abs(clip_high))
        assert (gradient == 0)[1, mask[1]].any().item() == (clipped and largest > 0)


@pytest.mark.parametrize("count", [1, 4, 1000])
def test_ess_is_one_for_equal_ratios_and_one_nth_for_a_single_huge_one(count: int) -> None:
    equal = ratio_statistics(*constant([0.3] * count))
    assert equal["ratio/token_ess"] == pytest.approx(1.0, rel=1e-12)
    assert equal["ratio/token_var"] == 0.0
    single = ratio_statistics(*constant([800.0] + [0.0] * (count - 1)))
    assert single["ratio/token_ess"] == pytest.approx(1 / count, rel=1e-12)


def test_overflowing_ratios_give_infinite_variance_and_finite_ess() -> None:
    statistics = ratio_statistics(*constant([900.0, 899.0, 0.0]))
    assert statistics["ratio/token_var"] == math.inf
    weights = np.exp([0.0, -1.0, -900.0])
    expected = weights.sum() ** 2 / (3 * (weights**2).sum())
    assert statistics["ratio/token_ess"] == pytest.approx(expected, rel=1e-12)
    assert statistics["kl_k3"] == math.inf
    assert not any(math.isnan(value) for value in statistics.values())


def test_equal_overflowing_ratios_have_no_variance() -> None:
    assert ratio_statistics(*constant([900.0, 900.0]))["ratio/token_var"] == 0.0


def test_tiny_sequence_variance_survives_the_arithmetic() -> None:
    log_ratios = 1e-6 * np.random.default_rng(0).normal(size=64)
    statistics = ratio_statistics(*constant(log_ratios.tolist()))
    expected = np.expm1(log_ratios).var()
    assert statistics["ratio/sequence_var"] == pytest.approx(expected, rel=1e-8, abs=0)
    nearly_one = ratio_statistics(*constant([1e-8, -1e-8]))
    assert nearly_one["kl_k3"] == pytest.approx(5e-17, rel=1e-6, abs=0)


def test_extreme_counts_ratios_and_their_inverses_beyond_a_bound() -> None:
    batch = constant([math.log(x) for x in (0.1, 0.4, 0.6, 1.0, 1.9, 2.1, 6.0, 1.0)])
    statistics = ratio_statistics(*batch)
    assert statistics["ratio/extreme_2"] == 4 / 8
    assert statistics["ratio/extreme_5"] == 2 / 8


def test_kl_estimators_are_unbiased_for_the_kl_of_old_against_new() -> None:
    old, new = torch.tensor([[0.5, 0.3, 0.2], [0.4, 0.4, 0.2]], dtype=torch.float64)
    samples = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)  # each token as often as old expects
    exact = (old * (old / new).log()).sum().item()
    log_new, log_old = new.log()[samples][None], old.log()[samples][None]
    statistics = ratio_statistics(log_new, log_old, torch.ones(1, 10, dtype=torch.bool))
    assert statistics["kl"] == pytest.approx(exact, rel=1e-12)
    assert statistics["kl_k3"] == pytest.approx(exact, rel=1e-12)


def test_mismatch_is_the_same_estimate_for_the_rollout_engine() -> None:
    new, old, mask = random_batch(4)
    statistics = ratio_statistics(new, old, mask)
    assert mismatch_statistics(new, old, mask) == {
        "mismatch/kl_k1": statistics["kl"],
        "mismatch/kl_k3": statistics["kl_k3"],
        "mismatch/extreme_2": statistics["ratio/extreme_2"],
    }


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), routing=st.floats(1e-3, 5.0), weight=st.floats(1e-3, 5.0))
def test_routing_and_weight_parts_add_up_to_the_variance_of_log_w(
    seed: int, routing: float, weight: float
) -> None:
    replayed, old, mask = random_batch(seed, spread=weight)
    live = replayed + routing * torch.randn(
        mask.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64
    )
    parts = split_log_ratio(live, replayed, old, mask)
    total = parts["ratio/routing_part"] + parts["ratio/weight_part"]
    total += 2 * parts["ratio/part_covariance"]
    whole = ratio_statistics(live, old, mask)["ratio/token_log_var"]
    assert total == pytest.approx(whole, rel=1e-9, abs=1e-12)
    x, y = (live - replayed)[mask].numpy(), (replayed - old)[mask].numpy()
    expected = np.cov(x, y, ddof=0)
    assert parts["ratio/routing_part"] == pytest.approx(expected[0, 0], rel=1e-9)
    assert parts["ratio/weight_part"] == pytest.approx(expected[1, 1], rel=1e-9)
    assert parts["ratio/part_covariance"] == pytest.approx(expected[0, 1], rel=1e-9, abs=1e-12)


def test_one_pass_made_three_ways_is_compared_with_the_engine_and_by_its_gates() -> None:
    (live, rollout, mask), (ids, _, _) = random_batch(1), random_batch(2)
    mask = mask & ids.isfinite()
    weights = rollout.clone()  # the engine's ids and weights, no weight has moved
    found = gate_statistics(live, ids, weights, rollout, mask)
    assert found["ratio/gate_part"] == pytest.approx((ids - weights)[mask].numpy().var(), rel=1e-9)
    assert found["rollout_ratio/k3_weights"] == 0.0
    for name, logprobs in (("live", live), ("ids", ids)):
        log_ratio = (logprobs - rollout)[mask].numpy()
        k3 = np.mean(np.exp(log_ratio) - 1 - log_ratio)
        assert found[f"rollout_ratio/k3_{name}"] == pytest.approx(k3, rel=1e-9)


def test_without_a_routing_change_the_routing_part_is_zero() -> None:
    replayed, old, mask = random_batch(1)
    parts = split_log_ratio(replayed, replayed, old, mask)
    assert parts["ratio/routing_part"] == 0.0 and parts["ratio/part_covariance"] == 0.0
    assert parts["ratio/weight_part"] > 0.0


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), algorithm=st.sampled_from(["grpo", "gspo", "gspo_token"]))
def test_clip_shares_are_those_of_ppos_definition(seed: int, algorithm: str) -> None:
    """A token of A < 0 whose ratio is below the range, or of A > 0 whose ratio is above it."""
    new, old, mask = random_batch(seed)
    advantages = torch.randn(
        len(new), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    advantages[1] = 0.0  # its tokens have no gradient either, and no clip took it
    gradient = gradient_of(algorithm, new, old, advantages, mask, clip_low=0.1, clip_high=0.2)
    log_ratio = (new - old).masked_fill(~mask, 0.0)
    if algorithm != "grpo":
        log_ratio = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    ratio, wide = log_ratio.exp().expand_as(new), advantages[:, None].expand_as(new)
    low = (((ratio < 0.9) & (wide < 0))[mask]).double().mean().item()
    high = (((ratio > 1.2) & (wide > 0))[mask]).double().mean().item()
    assert clip_shares(gradient, wide, mask) == pytest.approx(
        {"clip_ratio/low": low, "clip_ratio/high": high, "clip_ratio/region": low + high}
    )


def test_clip_shares_count_response_tokens() -> None:
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    gradient = torch.tensor([[0.0, 0.0, -1e-30, 0.0], [0.0, 0.0, 0.0, 0.0]])
    advantages = torch.tensor([[-1.0, 2.0, 1.0, math.nan], [0.0, 1.0, 1.0, 1.0]])
    assert clip_shares(gradient, advantages, mask) == {
        "clip_ratio/low": 0.25,
        "clip_ratio/high": 0.25,
        "clip_ratio/region": 0.5,
    }


def sampled(
    draw: torch.Generator, sharpness: float, count: int = 100_000, vocab: int = 8
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs of `count` tokens under the engine that drew each, under the engine's recompute
    with noise in its logits, and under some other policy; and a mask with half of them."""
    logits = 2 * torch.randn(count, vocab, generator=draw, dtype=torch.float64)
    other = logits + sharpness * torch.randn(count, vocab, generator=draw, dtype=torch.float64)
    noisy = logits + 2 * torch.randn(count, vocab, generator=draw, dtype=torch.float64)
    tokens = torch.multinomial(logits.softmax(-1), 1, generator=draw)
    engine, again, policy = (
        x.log_softmax(-1).gather(-1, tokens).view(-1, 10) for x in (logits, noisy, other)
    )
    mask = torch.rand(engine.shape, generator=draw) > 0.5
    return engine, again, policy, mask


@pytest.mark.parametrize("sharpness", [0.0, 0.3, 1.0, 2.0])
def test_over_the_sampling_policy_the_mean_ratio_is_one_and_its_tail_is_bounded(
    sharpness: float,
) -> None:
    """For any policy: sum_v mu(v) pi(v)/mu(v) = 1, and P(w > t) <= E[w]/t = 1/t."""
    engine, _, policy, mask = sampled(torch.Generator().manual_seed(0), sharpness)
    tail = ratio_tail(policy, engine, mask, prefix="rollout_ratio")
    count = int(mask.sum())
    error = (policy - engine)[mask].exp().std().item() / math.sqrt(count)
    assert abs(tail["rollout_ratio/mean"] - 1.0) <= 4 * error + 1e-12
    for t in SURVIVAL:
        noise = 4 * math.sqrt(1 / t / count)
        assert tail[f"rollout_ratio/survival_{t}"] <= 1 / t + noise


def test_over_a_noisy_recompute_neither_holds() -> None:
    engine, again, _, mask = sampled(torch.Generator().manual_seed(0), 0.0)
    tail = ratio_tail(engine, again, mask, prefix="ratio")  # not one weight has moved
    error = (engine - again)[mask].exp().std().item() / math.sqrt(int(mask.sum()))
    assert tail["ratio/mean"] > 1.0 + 10 * error
    for t in (10, 100, 1000):
        assert tail[f"ratio/survival_{t}"] > 2 / t


def test_a_tail_counts_tokens_above_t() -> None:
    batch = constant([math.log(x) for x in (0.001, 1.0, 2.1, 11.0, 101.0, 1001.0, 1e4, 1.9)])
    tail = ratio_tail(*batch, prefix="x")
    shares = [tail[f"x/survival_{t}"] for t in (2, 10, 100, 1000)]
    assert shares == [5 / 8, 4 / 8, 3 / 8, 2 / 8]
    assert tail["x/mean"] == pytest.approx((0.001 + 1 + 2.1 + 11 + 101 + 1001 + 1e4 + 1.9) / 8)
    assert ratio_tail(*constant([800.0, 0.0]), prefix="x")["x/mean"] == math.inf


def test_a_mask_without_a_token_gives_nan_everywhere() -> None:
    new, old, _ = random_batch()
    nothing = torch.zeros(new.shape, dtype=torch.bool)
    for statistics in (
        ratio_statistics(new, old, nothing),
        split_log_ratio(new, new, old, nothing),
        clip_shares(new, new, nothing),
        ratio_tail(new, old, nothing, prefix="x"),
    ):
        assert statistics and all(math.isnan(value) for value in statistics.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_logprobs_are_compared_in_float64(dtype: torch.dtype) -> None:
    new, old, mask = random_batch()
    new, old = new.to(dtype), old.to(dtype)
    assert ratio_statistics(new, old, mask) == ratio_statistics(new.double(), old.double(), mask)


def test_statistics_stay_outside_the_graph() -> None:
    new, old, mask = random_batch()
    statistics = ratio_statistics(new.requires_grad_(), old, mask)
    assert math.isfinite(statistics["ratio/token_var"]) and new.grad is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda n, o, m: ratio_statistics(n[0], o[0], m[0]), r"logprobs.shape=\[6\]"),
        (lambda n, o, m: ratio_statistics(n, o[:, 1:], m), r"old_logprobs.shape=\[9, 5\]"),
        (lambda n, o, m: ratio_statistics(n, o, m.float()), r"mask\.bool\(\)"),
        (lambda n, o, m: split_log_ratio(n, n[1:], o, m), r"replayed.shape=\[8, 6\]"),
        (lambda n, o, m: clip_shares(n, o[1:], m), r"advantages.shape=\[8, 6\]"),
        (lambda n, o, m: ratio_tail(n, o[1:], m, prefix="x"), r"denominator.shape=\[8, 6\]"),
        (lambda n, o, m: mismatch_statistics(n, o, m[1:]), r"like the mask, \[8, 6\]"),
    ],
)
def test_bad_input_names_the_argument(
    call: Callable[[Tensor, Tensor, Tensor], dict[str, float]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        call(*random_batch())
