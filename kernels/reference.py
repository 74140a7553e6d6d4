"""The definition of per-token log-probabilities, in plain PyTorch: every faster version is tested
against this one.

It materialises the logits and leaves the gradients to autograd, so it is also the fastest where
the logits are few. Shapes: N tokens (any leading shape `...`), H hidden size, V vocabulary.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_rl.kernels.arguments import NO_INDEX, ZERO_LOG_P, HeadInputs, can_look, check_targets


def reference_logprobs(
    inputs: HeadInputs, *, entropy: bool, lse: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`(logprobs, entropy, lse)`, each `[N]`; those that are not asked for are None."""
    check_targets(inputs)
    hidden, targets, dtype = inputs.hidden, inputs.targets, inputs.dtype
    keep = _kept(targets, inputs.ignore_index)
    if keep is not None:
        # A zero times a NaN of the padding is a NaN in the weight's gradient: the row itself goes.
        hidden, targets = hidden.where(keep.unsqueeze(1), 0), targets.where(keep, 0)
    # Autocast would run the matrix product in half precision behind our back.
    with torch.autocast(hidden.device.type, enabled=False):
        scores = _scores(hidden.to(dtype), inputs)
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


def _scores(hidden: Tensor, inputs: HeadInputs) -> Tensor:
    dtype, softcap, temperature = hidden.dtype, inputs.softcap, inputs.temperature
    bias = None if inputs.bias is None else inputs.bias.to(dtype)
    scores = F.linear(hidden, inputs.weight.to(dtype), bias)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if isinstance(temperature, Tensor):
        scores = scores / temperature.to(scores.dtype).unsqueeze(-1)
    elif temperature != 1.0:
        scores = scores / temperature
    return scores


def _kept(targets: Tensor, ignore_index: int) -> Tensor | None:
    """bool `[N]`, or None if it is known that all tokens count."""
    if ignore_index == NO_INDEX:
        return None
    keep = targets != ignore_index
    return None if can_look(targets) and bool(keep.all()) else keep


def _only(values: Tensor, keep: Tensor | None) -> Tensor:
    return values if keep is None else values.where(keep, 0)
