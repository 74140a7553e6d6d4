"""What every loss shares: its result, the masked log ratio, the clipped surrogate.

Shapes: B sequences, T response positions (right padded).
"""

from __future__ import annotations

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
    """Signature shared by all algorithms of this package."""

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
        """Logprobs and mask [B, T], advantages [B], and what `grpo_loss` says of the rest."""
        ...


def check_inputs(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    token_advantages: bool = False,
) -> None:
    """Raise ValueError unless the tensors are [B, T], [B, T], [B] (or [B, T]) and bool [B, T].

    Nothing broadcasts: a [T] or [B, 1] tensor that would broadcast is nearly always a forgotten
    batch dimension, and the loss would be wrong without a sign of it.
    """
    if logprobs.ndim != 2:
        raise ValueError(
            f"logprobs has shape {list(logprobs.shape)}; expected [B, T]: sequences by response "
            "positions (unsqueeze(0) a single sequence)"
        )
    if not logprobs.is_floating_point():
        raise ValueError(f"logprobs has dtype {logprobs.dtype}; expected a floating-point dtype")
    shape = logprobs.shape
    if old_logprobs.shape != shape:
        raise ValueError(
            f"old_logprobs has shape {list(old_logprobs.shape)}; expected that of logprobs, "
            f"{list(shape)}: pass the old log-prob of each token, padded alike"
        )
    if mask.shape != shape:
        raise ValueError(
            f"mask has shape {list(mask.shape)}; expected that of logprobs, {list(shape)}: "
            "pass the mask of response positions only, without the prompt"
        )
    if mask.dtype != torch.bool:
        raise ValueError(f"mask has dtype {mask.dtype}; expected torch.bool: pass mask.bool()")
    if advantages.shape == shape[:1] or (token_advantages and advantages.shape == shape):
        return
    if advantages.shape == shape:
        fix = "use gspo_token_loss for per-token advantages"
    else:
        fix = "pass one advantage a sequence (flatten the [P, G] of group_advantages)"
    expected = f"[{shape[0]}]" + (f" or {list(shape)}" if token_advantages else "")
    raise ValueError(f"advantages has shape {list(advantages.shape)}; expected {expected}: {fix}")


def check_clip_bounds(clip_low: float, clip_high: float) -> None:
    """Raise ValueError unless 0 <= clip_low <= 1 and clip_high >= 0."""
    if not 0.0 <= clip_low <= 1.0:
        raise ValueError(
            f"clip_low is {clip_low}; expected a number from 0 to 1: it is subtracted from 1 to "
            "give the lower bound of a ratio"
        )
    if not clip_high >= 0.0:
        raise ValueError(
            f"clip_high is {clip_high}; expected a number >= 0: it is added to 1 to give the "
            "upper bound of a ratio"
        )


class Prepared(NamedTuple):
    """Checked inputs, in the form that every loss starts from."""

    log_ratio: Tensor
    """log w [B, T], 0 in padding; see `masked_log_ratio`."""

    advantages: Tensor
    """[B] or [B, T], without gradient, in the dtype of log_ratio."""

    lengths: Tensor
    """int64 [B], response tokens of each sequence, at least 1: they divide."""

    divisor: int
    """The number of sequences to divide by."""


def prepare(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
    num_sequences: int | None,
    *,
    token_advantages: bool = False,
) -> Prepared:
    """Check what a loss was given, and compute what all of them need.

    Raises:
        ValueError: see `check_inputs` and `check_clip_bounds`; or fewer than one sequence.
    """
    check_inputs(logprobs, old_logprobs, advantages, mask, token_advantages=token_advantages)
    check_clip_bounds(clip_low, clip_high)
    divisor = logprobs.shape[0] if num_sequences is None else num_sequences
    if divisor < 1:
        raise ValueError(
            f"num_sequences is {divisor}; expected at least 1: pass the number of sequences of "
            "the whole minibatch, over all micro-batches and ranks"
        )
    log_ratio = masked_log_ratio(logprobs, old_logprobs, mask)
    advantages = advantages.detach().to(log_ratio.dtype)
    return Prepared(log_ratio, advantages, mask.sum(1).clamp(min=1), divisor)


def spread_advantages(advantages: Tensor, mask: Tensor) -> Tensor:
    """One advantage a response token, [B, T], from [B] or [B, T]; 0 in padding."""
    if advantages.ndim == 1:
        advantages = advantages[:, None].expand_as(mask)
    return advantages.masked_fill(~mask, 0.0)


def masked_log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """log w = logprobs - old_logprobs under the mask, 0 in padding; [B, T], float32 or wider.

    A select, not a product: NaN * 0 is NaN, and padding may hold anything. The gradient that
    reaches padded positions is exactly 0, and none reaches `old_logprobs`.
    """
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    log_ratio = logprobs.to(dtype) - old_logprobs.detach().to(dtype)
    return log_ratio.masked_fill(~mask, 0.0)


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
    """
    log_low = math.log1p(-clip_low) if clip_low < 1.0 else -math.inf
    log_high = math.log1p(clip_high)
    with torch.no_grad():
        clipped_low = (advantages < 0) & (log_ratio < log_low)
        clipped_high = (advantages > 0) & (log_ratio > log_high)
        inert = advantages == 0
    picked = log_ratio.masked_fill(clipped_low, log_low).masked_fill(clipped_high, log_high)
    return picked.masked_fill(inert, 0.0), clipped_low, clipped_high
