"""What every loss shares: inputs that are checked once, the clipped surrogate, means over tokens.

A loss is a pure function `loss(inputs, **options) -> Tensor`: `LossInputs` in, the loss of each
token out, [B, T], to be minimised. `aggregate` then makes the scalar, so that a loss need not know
what micro-batches or other processes hold. Shapes: B sequences, T response positions.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["sequence_mean", "token_mean", "fixed_length"]


@dataclass(frozen=True, kw_only=True)
class LossInputs:
    """What a loss is a function of: [B, T] each, float32 or wider, 0 in padding; see `make_inputs`.

    Ratios are kept as logs, nats: exp is the last thing that a loss does.
    """

    logprobs: Tensor
    """Of the policy being trained, with a gradient."""
    old_logprobs: Tensor
    """Of the policy in the ratio's denominator."""
    rollout_logprobs: Tensor
    """Of the engine that sampled the tokens."""
    advantages: Tensor
    mask: Tensor
    """bool, True at response tokens."""
    router_shift: Tensor | None = None
    """RSPO's gamma in (0, 1], 1 where no router has moved (`router_shift_ratio` of
    routing/statistics.py); None where the routers were not recorded."""
    values: Tensor | None = None
    """Of a value head, reward units, with a gradient; None where no value head is trained."""
    old_values: Tensor | None = None
    """Of the value head before the updates on the rollout."""
    returns: Tensor | None = None
    """What the values are to be."""

    @cached_property
    def lengths(self) -> Tensor:
        """int64 [B, 1], response tokens of each sequence, at least 1: they divide."""
        return self.mask.sum(1, keepdim=True).clamp(min=1)

    @cached_property
    def log_ratio(self) -> Tensor:
        """log w = logprobs - old_logprobs."""
        return self.logprobs - self.old_logprobs

    @cached_property
    def log_correction(self) -> Tensor:
        """log of trainer over engine, old_logprobs - rollout_logprobs; without gradient."""
        return self.old_logprobs - self.rollout_logprobs

    def sequence_mean(self, values: Tensor) -> Tensor:
        """Mean over each sequence's tokens: [B, T], 0 in padding, to [B, 1]."""
        return values.sum(1, keepdim=True) / self.lengths


LossFunction = Callable[..., Tensor]
"""`loss(inputs: LossInputs, **options: float) -> Tensor`, the loss of each token, [B, T]; options
are keyword-only with defaults, and what padding holds does not count."""


def make_inputs(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    rollout_logprobs: Tensor | None = None,
    router_shift: Tensor | None = None,
    values: Tensor | None = None,
    old_values: Tensor | None = None,
    returns: Tensor | None = None,
) -> LossInputs:
    """Check the tensors that a loss is computed from, and bring them to one form.

    Nothing broadcasts: a [T] or [B, 1] tensor that would broadcast is nearly always a forgotten
    batch dimension, and the loss would be wrong without a sign of it.

    Args:
        logprobs: [B, T], nats; only this input and `values` get a gradient.
        old_logprobs: [B, T], nats.
        advantages: [B], one per sequence, or [B, T].
        mask: bool [B, T], True at response tokens; padding may hold anything, NaN included.
        rollout_logprobs: [B, T], nats; old_logprobs if the engine and the trainer are one.
        router_shift: [B, T], in (0, 1].
        values, old_values, returns: [B, T], reward units.

    Raises:
        ValueError: a tensor of another shape, or a mask that is not bool.
    """
    shape = logprobs.shape
    rollout_logprobs = old_logprobs if rollout_logprobs is None else rollout_logprobs
    if logprobs.ndim != 2:
        raise ValueError(f"logprobs.shape={list(shape)}: expected [B, T]; reshape it")
    if advantages.shape not in (shape[:1], shape):
        raise ValueError(
            f"advantages.shape={list(advantages.shape)}: expected one per sequence, "
            f"{list(shape[:1])}, or one per token; reshape it"
        )
    of_tokens: dict[str, Tensor | None] = {
        "old_logprobs": old_logprobs,
        "rollout_logprobs": rollout_logprobs,
        "mask": mask,
        "router_shift": router_shift,
        "values": values,
        "old_values": old_values,
        "returns": returns,
    }
    for name, value in of_tokens.items():
        if value is not None and value.shape != shape:
            raise ValueError(
                f"{name}.shape={list(value.shape)}: expected {list(shape)}, one value for each "
                "response token; reshape it"
            )
    if mask.dtype != torch.bool:
        raise ValueError(f"mask.dtype={mask.dtype}: expected torch.bool; pass mask.bool()")
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    wide = advantages if advantages.ndim == 2 else advantages[:, None].expand(shape)

    def clean(values: Tensor) -> Tensor:
        # A select, not a product: NaN * 0 is NaN, and padding may hold anything. The gradient that
        # reaches padded positions is exactly 0.
        return values.to(dtype).masked_fill(~mask, 0.0)

    def clean_constant(values: Tensor | None) -> Tensor | None:
        return None if values is None else clean(values.detach())

    return LossInputs(
        logprobs=clean(logprobs),
        old_logprobs=clean(old_logprobs.detach()),
        rollout_logprobs=clean(rollout_logprobs.detach()),
        advantages=clean(wide.detach()),
        mask=mask,
        router_shift=clean_constant(router_shift),
        values=None if values is None else clean(values),
        old_values=clean_constant(old_values),
        returns=clean_constant(returns),
    )


def aggregate(
    token_losses: Tensor, inputs: LossInputs, how: Aggregation, *, divisor: float | None = None
) -> Tensor:
    """The scalar loss of a minibatch, or of the part of it that one process or micro-batch holds.

        sequence_mean   1/N sum_i 1/|y_i| sum_t l_it    GRPO (arXiv 2402.03300)
        token_mean      1/M sum_it l_it, M tokens       DAPO (arXiv 2503.14476), eq. 8
        fixed_length    1/(N T) sum_it l_it             Dr. GRPO (arXiv 2503.20783), T the budget

    Args:
        divisor: N, M or N T of the whole minibatch, so that the losses of its parts sum to its
            loss; by default those of `inputs`. A sequence without a token counts in N.
    """
    kept = token_losses.masked_fill(~inputs.mask, 0.0)
    if how == "sequence_mean":
        return (kept.sum(1, keepdim=True) / inputs.lengths).sum() / (divisor or len(kept))
    if how == "token_mean":
        return kept.sum() / (divisor or max(1, int(inputs.mask.sum())))
    return kept.sum() / (divisor or kept.numel())


def check_clip_bounds(clip_low: float, clip_high: float) -> None:
    """Raise ValueError unless 0 <= clip_low <= 1 and clip_high >= 0."""
    if not (0.0 <= clip_low <= 1.0 and clip_high >= 0.0):
        raise ValueError(
            f"clip_low={clip_low}, clip_high={clip_high}: a ratio is clipped to "
            "[1 - clip_low, 1 + clip_high]; use clip_low from 0 to 1 and clip_high of at least 0"
        )


def clip_log_ratio(
    log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """The log ratio that the surrogate's min picks.

    min(w A, clip(w, 1 - low, 1 + high) A) is w' A with w' = 1 - low where A < 0 and w < 1 - low,
    w' = 1 + high where A > 0 and w > 1 + high, and w' = w elsewhere. Returned is log w'.
    log_ratio and advantages broadcast.

    The choice is made on log w, before exp: where the clipped branch is picked, an overflowing w
    never enters the graph (its gradient would be 0 * inf = NaN). Where A = 0 log w' is 0 for the
    same reason. Left raw is A < 0 with w > 1: the surrogate is unbounded there by design (the
    papers have no dual clip), so that loss and gradient become inf, not NaN, once exp overflows.

    Raises:
        ValueError: see `check_clip_bounds`.
    """
    check_clip_bounds(clip_low, clip_high)
    log_low = math.log1p(-clip_low) if clip_low < 1.0 else -math.inf
    log_high = math.log1p(clip_high)
    with torch.no_grad():
        clipped_low = (advantages < 0) & (log_ratio < log_low)
        clipped_high = (advantages > 0) & (log_ratio > log_high)
        inert = advantages == 0
    picked = log_ratio.masked_fill(clipped_low, log_low).masked_fill(clipped_high, log_high)
    return picked.masked_fill(inert, 0.0)


def clipped_surrogate(
    log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """min(w A, clip(w, 1 - low, 1 + high) A) of log w, which need not be the token's own ratio."""
    return clip_log_ratio(log_ratio, advantages, clip_low, clip_high).exp() * advantages


def weighted_logprobs(inputs: LossInputs, weight: Tensor) -> Tensor:
    """weight A log pi, whose gradient is the policy gradient times `weight`, which has none itself.

    0 where the factor is 0, even of a log-prob of -inf: 0 * inf is NaN.
    """
    factor = weight * inputs.advantages
    return factor * inputs.logprobs.masked_fill(factor == 0, 0.0)
