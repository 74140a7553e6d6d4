"""What every loss shares: its signature, its result, checked inputs and the clipped surrogate.

Shapes: B sequences, T response positions (right padded), N sequences of the whole minibatch.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LossOutput:
    """A loss and the tokens whose gradient the clip removed."""

    loss: Tensor
    """Scalar to minimise, float32 or wider; differentiable in `logprobs` only."""
    clipped_low: Tensor
    """bool [B, T]: response tokens with ratio < 1 - clip_low and advantage < 0."""
    clipped_high: Tensor
    """bool [B, T]: response tokens with ratio > 1 + clip_high and advantage > 0."""


class LossFunction(Protocol):
    """The signature of every algorithm in this package."""

    def __call__(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        *,
        clip_low: float = ...,
        clip_high: float = ...,
        num_sequences: int | None = None,
    ) -> LossOutput:
        """The loss of a minibatch, or of the part of it that one process or micro-batch holds.

        A sequence without a token adds 0 to the loss and still counts in N.

        Args:
            logprobs: [B, T], nats, of the policy being trained; only this input gets a gradient.
            old_logprobs: [B, T], nats, of the policy that the ratio is taken against.
            advantages: [B], one per sequence; `gspo_token_loss` also takes [B, T].
            mask: bool [B, T], True at response tokens; padding may hold anything, NaN included.
            clip_low: the ratio's lower bound is 1 - clip_low; from 0 to 1.
            clip_high: the ratio's upper bound is 1 + clip_high; at least 0.
            num_sequences: N over all micro-batches and ranks, so that the losses of the parts sum
                to the loss of the whole; B by default.

        Raises:
            ValueError: a tensor of another shape, a mask that is not bool, or a clip range out of
                bounds.
        """
        ...


class LossInputs(NamedTuple):
    """Checked inputs, in the form that every loss starts from."""

    log_ratio: Tensor
    """log w = logprobs - old_logprobs, 0 in padding: [B, T], float32 or wider."""
    advantages: Tensor
    """[B] or [B, T], without gradient, in the dtype of log_ratio."""
    mask: Tensor
    """bool [B, T]."""
    lengths: Tensor
    """int64 [B], response tokens of each sequence, at least 1: they divide."""
    num_sequences: int
    """N, which the sum over sequences is divided by."""


def prepare_inputs(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    num_sequences: int | None,
    *,
    token_advantages: bool = False,
) -> LossInputs:
    """Check the tensors that a loss was given, and compute what all losses need.

    Nothing broadcasts: a [T] or [B, 1] tensor that would broadcast is nearly always a forgotten
    batch dimension, and the loss would be wrong without a sign of it.

    Raises:
        ValueError: see `LossFunction`; `token_advantages` allows advantages [B, T].
    """
    shape = logprobs.shape
    per_sequence = advantages.shape == shape[:1]
    per_token = token_advantages and advantages.shape == shape
    one_each = f"one per sequence, {list(shape[:1])} (gspo_token also takes one per token)"
    for name, value, fits, expected in (
        ("logprobs", logprobs, logprobs.ndim == 2, "[B, T]"),
        ("old_logprobs", old_logprobs, old_logprobs.shape == shape, f"{list(shape)}"),
        ("mask", mask, mask.shape == shape, f"{list(shape)}, response positions only"),
        ("advantages", advantages, per_sequence or per_token, one_each),
    ):
        if not fits:
            raise ValueError(f"{name}.shape={list(value.shape)}: expected {expected}; reshape it")
    if mask.dtype != torch.bool:
        raise ValueError(f"mask.dtype={mask.dtype}: expected torch.bool; pass mask.bool()")
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    # A select, not a product: NaN * 0 is NaN, and padding may hold anything. The gradient that
    # reaches padded positions is exactly 0, and none reaches `old_logprobs`.
    log_ratio = (logprobs.to(dtype) - old_logprobs.detach().to(dtype)).masked_fill(~mask, 0.0)
    return LossInputs(
        log_ratio=log_ratio,
        advantages=advantages.detach().to(dtype),
        mask=mask,
        lengths=mask.sum(1).clamp(min=1),
        num_sequences=shape[0] if num_sequences is None else num_sequences,
    )


def check_clip_bounds(clip_low: float, clip_high: float) -> None:
    """Raise ValueError unless 0 <= clip_low <= 1 and clip_high >= 0."""
    if not (0.0 <= clip_low <= 1.0 and clip_high >= 0.0):
        raise ValueError(
            f"clip_low={clip_low}, clip_high={clip_high}: a ratio is clipped to "
            "[1 - clip_low, 1 + clip_high]; use clip_low from 0 to 1 and clip_high of at least 0"
        )


def clip_log_ratio(
    log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The log ratio that the surrogate's min picks, and where the clip picked it.

    min(w A, clip(w, 1 - low, 1 + high) A) is w' A with w' = 1 - low where A < 0 and w < 1 - low,
    w' = 1 + high where A > 0 and w > 1 + high, and w' = w elsewhere. Returned are log w', and
    the two conditions as bool tensors. log_ratio and advantages have one shape.

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
    return picked.masked_fill(inert, 0.0), clipped_low, clipped_high


def clipped_token_loss(
    log_ratio: Tensor, inputs: LossInputs, clip_low: float, clip_high: float
) -> LossOutput:
    """-1/N sum_i 1/|y_i| sum_t min(w_it A_it, clip(w_it, 1 - low, 1 + high) A_it).

    `log_ratio` is log w_it [B, T], which need not be the token's own ratio. An advantage per
    sequence is repeated over its tokens.
    """
    advantages = inputs.advantages
    if advantages.ndim == 1:
        advantages = advantages[:, None].expand_as(inputs.mask)
    advantages = advantages.masked_fill(~inputs.mask, 0.0)
    picked, low, high = clip_log_ratio(log_ratio, advantages, clip_low, clip_high)
    surrogate = picked.exp() * advantages
    loss = -(surrogate.sum(1) / inputs.lengths).sum() / inputs.num_sequences
    return LossOutput(loss=loss, clipped_low=low, clipped_high=high)
