"""The definition of per-token log-probabilities, in plain PyTorch: every faster version is tested
against this one.

It materialises the logits and leaves the gradients to autograd, so it is also the fastest where
the logits are few. Shapes: N tokens (any leading shape `...`), H hidden size, V vocabulary.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_rl.kernels.arguments import (
    NO_INDEX,
    ZERO_LOG_P,
    Head,
    can_look,
    check_words,
    compute_dtype,
)


def reference_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    head: Head,
    *,
    entropy: bool,
    lse: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`(logprobs, entropy, lse)`, each `[N]`; those that are not asked for are None.

    Arguments as in `token_logprobs`, with hidden `[N, H]` and targets `[N]`.
    """
    check_words(targets, len(weight), head)
    dtype = compute_dtype(hidden, weight, bias)
    keep = _kept(targets, head.ignore_index)
    if keep is not None:
        # A zero times a NaN of the padding is a NaN in the weight's gradient: the row itself goes.
        hidden, targets = hidden.where(keep.unsqueeze(1), 0), targets.where(keep, 0)
    # Autocast would run the matrix product in half precision behind our back.
    with torch.autocast(hidden.device.type, enabled=False):
        scores = _scores(hidden.to(dtype), weight.to(dtype), bias, head)
        if entropy:
            log_p = scores.log_softmax(-1)
            logprobs = log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
            # A removed word has p = 0 and log p = -inf, and 0 * -inf is NaN: its term is 0.
            spread = -(log_p.exp() * log_p.clamp_min(ZERO_LOG_P)).sum(-1)
        else:
            # PyTorch's fused log_softmax and gather. No index is to be ignored: its default would
            # answer 0 for a target of -100 where `ignore_index=None` promises an error.
            logprobs = -F.cross_entropy(scores, targets, reduction="none", ignore_index=NO_INDEX)
            spread = None
        return (
            _only(logprobs, keep),
            None if spread is None else _only(spread, keep),
            _only(scores.logsumexp(-1), keep) if lse else None,
        )


def _scores(hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head) -> Tensor:
    scores = F.linear(hidden, weight, None if bias is None else bias.to(hidden.dtype))
    if head.softcap is not None:
        scores = head.softcap * torch.tanh(scores / head.softcap)
    if isinstance(head.temperature, Tensor):
        scores = scores / head.temperature.to(scores.dtype).unsqueeze(-1)
    elif head.temperature != 1.0:
        scores = scores / head.temperature
    return scores


def _kept(targets: Tensor, ignore_index: int) -> Tensor | None:
    """bool `[N]`, or None if it is known that all tokens count."""
    if ignore_index == NO_INDEX:
        return None
    keep = targets != ignore_index
    return None if can_look(targets) and bool(keep.all()) else keep


def _only(values: Tensor, keep: Tensor | None) -> Tensor:
    return values if keep is None else values.where(keep, 0)
