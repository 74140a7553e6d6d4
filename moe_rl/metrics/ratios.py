"""Statistics of importance ratios: how far the policy being trained is from the one that sampled.

Shapes: B sequences, T response positions; `mask` is bool [B, T], True at response tokens, and
padding may hold anything. log w = logprobs - old_logprobs per token, raw, before any clip;
log s = mean_t log w per sequence (GSPO's ratio, arXiv 2507.18071 eq. 7). All variances have the
divisor N, so that the effective sample size is 1/(1 + CV^2) exactly and the parts of log w add up.

Everything is computed in float64, without a host synchronisation until all values are read at once.
A mask without a token makes every value NaN. Tensors that are not all [B, T], or a mask that is not
bool, raise ValueError.
"""

import math

import torch
from torch import Tensor

# R3 (arXiv 2510.11370) reports the share of tokens whose ratio is off by more than a factor of 2;
# 5 is IcePop's upper bound, beyond which it masks a token.
EXTREMES = (2, 5)
SURVIVAL = (2, 10, 100, 1000)
"""Ratios t at which P(w > t) is logged."""


def ratio_statistics(
    logprobs: Tensor,
    old_logprobs: Tensor,
    mask: Tensor,
) -> dict[str, float]:
    """Every statistic of token and sequence ratios that an update logs.

    With x standing for `token` (w, over response tokens) and `sequence` (s, over sequences that
    have a token), and r for the ratio:

        ratio/x_log_mean, _log_var, _log_p01, _log_p99, _log_max   of log r, nats (nats^2 for var)
        ratio/x_var       variance of r; inf where float64 overflows
        ratio/x_ess       (sum r)^2 / (N sum r^2) = 1/(1 + CV^2(r)), in [1/N, 1]; never overflows
        ratio/extreme_T   share of tokens with max(w, 1/w) > T, T of 2 and 5
        ratio/mean, ratio/survival_T   see `ratio_tail`
        kl                mean over tokens of -log w: k1 estimate of KL(old || new), nats
        kl_k3             mean over tokens of w - 1 - log w: k3 estimate of the same, >= 0, nats

    Quantiles interpolate linearly between order statistics. KL estimators: Schulman 2020,
    "Approximating KL Divergence". An infinite log ratio makes `_log_var` NaN.
    """
    _check_shapes(mask, logprobs=logprobs, old_logprobs=old_logprobs)
    log_ratio = _masked_difference(logprobs, old_logprobs, mask)
    lengths = mask.sum(1)
    sequence_log_ratio = log_ratio.sum(1) / lengths.clamp(min=1)
    values: dict[str, Tensor] = {}
    for name, log_r, keep in (
        ("token", log_ratio, mask),
        ("sequence", sequence_log_ratio, lengths > 0),
    ):
        moments = _moments(log_r, keep)
        values |= {f"ratio/{name}_{key}": value for key, value in moments.items()}
    values |= {f"ratio/extreme_{t:g}": _extreme(log_ratio, mask, t) for t in EXTREMES}
    values |= {"kl": _mean(-log_ratio, mask), "kl_k3": _mean(_k3(log_ratio), mask)}
    values |= _tail("ratio", log_ratio, mask)
    return read(values, mask)


def mismatch_statistics(
    logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor
) -> dict[str, float]:
    """How far the trainer's log-probs are from the rollout engine's, on equal weights.

        mismatch/kl_k1       mean of log r, with log r = rollout_logprobs - logprobs, nats
        mismatch/kl_k3       mean of 1/r - 1 + log r, >= 0, nats
        mismatch/extreme_2   share of tokens with max(r, 1/r) > 2

    Both estimate KL(rollout || trainer), as the rollout engine sampled the tokens.
    """
    _check_shapes(mask, logprobs=logprobs, rollout_logprobs=rollout_logprobs)
    log_ratio = _masked_difference(logprobs, rollout_logprobs, mask)
    values = {
        "mismatch/kl_k1": _mean(-log_ratio, mask),
        "mismatch/kl_k3": _mean(_k3(log_ratio), mask),
        "mismatch/extreme_2": _extreme(log_ratio, mask, 2),
    }
    return read(values, mask)


def ratio_tail(
    logprobs: Tensor, denominator: Tensor, mask: Tensor, *, prefix: str
) -> dict[str, float]:
    """Mean and right tail of w = exp(logprobs - denominator) over response tokens.

        PREFIX/mean         mean of w; inf where float64 overflows
        PREFIX/survival_T   share of tokens with w > T, for T in SURVIVAL

    Where the denominator is the policy that sampled the tokens, E[w] = 1 for every policy that has
    not learnt from these very tokens, and so P(w > T) <= 1/T (Markov's inequality). A mean above 1
    by more than its standard error says that it is not.
    """
    _check_shapes(mask, logprobs=logprobs, denominator=denominator)
    return read(_tail(prefix, _masked_difference(logprobs, denominator, mask), mask), mask)


def split_log_ratio(live: Tensor, replayed: Tensor, old: Tensor, mask: Tensor) -> dict[str, float]:
    """The variance of log w = live - old, split into what routing and what weights contributed.

        log w = [live - replayed] + [replayed - old]

        ratio/routing_part      variance of live - replayed, nats^2
        ratio/weight_part       variance of replayed - old, nats^2
        ratio/part_covariance   covariance of the two, nats^2

    var(log w) = routing_part + weight_part + 2 part_covariance exactly; it is the
    `ratio/token_log_var` of `ratio_statistics(live, old, mask)`. A negative covariance means that
    the change of routing undoes part of the change of weights.

    Args:
        live: [B, T], log-probs of the new weights under their own routing, nats.
        replayed: those of the new weights under the old policy's routing.
        old: those of the old weights under the old routing.
        mask: bool [B, T].
    """
    _check_shapes(mask, live=live, replayed=replayed, old=old)
    routing = _masked_difference(live, replayed, mask)
    weight = _masked_difference(replayed, old, mask)
    routing = (routing - _mean(routing, mask)).masked_fill(~mask, 0.0)
    weight = (weight - _mean(weight, mask)).masked_fill(~mask, 0.0)
    values = {
        "ratio/routing_part": _mean(routing * routing, mask),
        "ratio/weight_part": _mean(weight * weight, mask),
        "ratio/part_covariance": _mean(routing * weight, mask),
    }
    return read(values, mask)


def gate_statistics(
    live: Tensor, ids: Tensor, weights: Tensor, rollout_logprobs: Tensor, mask: Tensor
) -> dict[str, float]:
    """What replaying gate weights adds to replaying ids: one pass made three ways (TRR).

        ratio/gate_part           variance of ids - weights, nats^2
        rollout_ratio/k3_live     k3 estimate of KL(rollout || new policy), routed live, nats
        rollout_ratio/k3_ids      the same under the engine's ids
        rollout_ratio/k3_weights  the same under the engine's ids and gate weights

    The three stand side by side in prime-rl #3523.

    Args:
        live, ids, weights: [B, T], log-probs of the new weights under their own routing, under the
            engine's ids, and under its ids and gate weights, nats.
        rollout_logprobs: [B, T], those of the engine.
        mask: bool [B, T].
    """
    _check_shapes(mask, live=live, ids=ids, weights=weights, rollout_logprobs=rollout_logprobs)
    gates = _masked_difference(ids, weights, mask)
    values = {"ratio/gate_part": _mean((gates - _mean(gates, mask)).square(), mask)}
    for name, logprobs in (("live", live), ("ids", ids), ("weights", weights)):
        log_ratio = _masked_difference(logprobs, rollout_logprobs, mask)
        values[f"rollout_ratio/k3_{name}"] = _mean(_k3(log_ratio), mask)
    return read(values, mask)


def clip_shares(gradient: Tensor, advantages: Tensor, mask: Tensor) -> dict[str, float]:
    """Shares of response tokens whose gradient the loss removed: it is 0, and A is not.

        clip_ratio/low      those with A < 0: PPO's clip removes them where the ratio is small
        clip_ratio/high     those with A > 0: where it is large
        clip_ratio/region   both

    All three are in [0, 1]; GSPO paper (arXiv 2507.18071), figure 2, reports the last. A mask of
    the ratio, as IcePop's, removes tokens of both signs on both sides: `branch/*` tells them apart.

    Args:
        gradient: [B, T], of the loss in each log-prob.
        advantages: [B, T].
        mask: bool [B, T].
    """
    _check_shapes(mask, gradient=gradient, advantages=advantages)
    removed = gradient == 0
    low, high = (removed & (advantages < 0)).double(), (removed & (advantages > 0)).double()
    values = {
        "clip_ratio/low": _mean(low, mask),
        "clip_ratio/high": _mean(high, mask),
        "clip_ratio/region": _mean(low + high, mask),
    }
    return read(values, mask)


def _moments(log_ratio: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Statistics of `log_ratio` (0 in padding) and of its exponential, over `mask`."""
    count = mask.sum()
    mean = log_ratio.sum() / count
    log_var = _mean((log_ratio - mean).square(), mask)
    # Ascending with padding last, so that order statistics are at indices below `count`.
    ordered = log_ratio.masked_fill(~mask, math.inf).flatten().sort().values
    maximum = ordered[(count - 1).clamp(min=0)]
    # Ratios relative to the largest are in [0, 1]: their sums cannot overflow, and the ESS does
    # not depend on the scale. A variance taken as E[r^2] - E[r]^2 would lose GSPO's 1e-8.
    relative = (log_ratio - maximum).exp().masked_fill(~mask, 0.0)
    total, squares = relative.sum(), relative.square().sum()
    relative_var = _mean((relative - total / count).square(), mask)
    return {
        "log_mean": mean,
        "log_var": log_var,
        "log_p01": _order_statistic(ordered, count, 0.01),
        "log_p99": _order_statistic(ordered, count, 0.99),
        "log_max": maximum,
        # The product exp(2 max) * relative_var would be inf * 0 for equal, huge ratios.
        "var": (2.0 * maximum + relative_var.log()).exp(),
        "ess": total.square() / (count * squares),
    }


def _order_statistic(ordered: Tensor, count: Tensor, quantile: float) -> Tensor:
    # In float64: an integer tensor times a Python float would round to float32.
    position = (count - 1).clamp(min=0).double() * quantile
    below = position.floor()
    low, high = ordered[below.long()], ordered[position.ceil().long()]
    # Equal neighbours may both be infinite, where the interpolation would be inf - inf.
    return torch.where(low == high, low, low + (position - below) * (high - low))


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return values.masked_fill(~mask, 0.0).sum() / mask.sum()


def _k3(log_ratio: Tensor) -> Tensor:
    """w - 1 - log w, with expm1 because near w = 1 it is the difference of equal numbers."""
    return log_ratio.expm1() - log_ratio


def _extreme(log_ratio: Tensor, mask: Tensor, tau: float) -> Tensor:
    """Share of tokens with max(w, 1/w) > tau."""
    return _mean((log_ratio.abs() > math.log(tau)).double(), mask)


def _tail(prefix: str, log_ratio: Tensor, mask: Tensor) -> dict[str, Tensor]:
    shares = {
        f"{prefix}/survival_{t}": _mean((log_ratio > math.log(t)).double(), mask) for t in SURVIVAL
    }
    return {f"{prefix}/mean": _mean(log_ratio.exp(), mask), **shares}


def _masked_difference(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """a - b in float64, 0 in padding, outside the graph."""
    return (a.detach().double() - b.detach().double()).masked_fill(~mask, 0.0)


def _check_shapes(mask: Tensor, **tensors: Tensor) -> None:
    for name, value in tensors.items():
        if value.ndim != 2 or value.shape != mask.shape:
            raise ValueError(
                f"{name}.shape={list(value.shape)}: expected [B, T] like the mask, "
                f"{list(mask.shape)}; pass response positions only"
            )
    if mask.dtype != torch.bool:
        raise ValueError(f"mask.dtype={mask.dtype}: expected torch.bool; pass mask.bool()")


def read(values: dict[str, Tensor], mask: Tensor) -> dict[str, float]:
    """One transfer for all values; NaN for all if the mask is empty."""
    numbers = torch.stack([*values.values(), mask.any().double()]).tolist()
    filled = numbers.pop()
    return dict(zip(values, numbers, strict=True)) if filled else dict.fromkeys(values, math.nan)
