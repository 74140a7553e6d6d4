"""The definition of per-token log-probabilities, in plain PyTorch: every faster version is tested
against this one.

Shapes: N tokens (any leading shape `...`), H hidden size, V vocabulary.
"""

import math
from typing import Literal, overload

import torch
from torch import Tensor
from torch.nn import functional as F

_NO_INDEX = torch.iinfo(torch.int64).min  # no target has this value


@overload
def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = ...,
    temperature: float = ...,
    entropy: Literal[False] = ...,
) -> Tensor: ...


@overload
def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = ...,
    temperature: float = ...,
    entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each target token under a language-model head, and optionally the entropy.

        z = (hidden @ weight.T + bias) / temperature
        logprobs = z[targets] - logsumexp(z)            nats
        entropy  = -sum_v p_v log p_v,  p = softmax(z)  nats

    All arithmetic is in float32 (float64 as soon as one input is float64), whatever the dtype of
    the inputs and also under autocast: a bfloat16 log-probability has steps of 2^-6 near -2, which
    is more than the width of GSPO's clip range.

    Args:
        hidden: `[..., H]`, floating point; the last hidden states, after the final norm.
        weight: `[V, H]`, floating point; the head's matrix.
        targets: `[...]`, int64 in `[0, V)`. The range is left to PyTorch (IndexError or
            RuntimeError on a CPU, a device-side assert on a GPU): looking at the values would
            drain a GPU's queue.
        bias: `[V]`, floating point, or None. An entry of -inf removes a word.
        temperature: softmax temperature, positive and finite; 1 leaves the logits alone.
        entropy: return the entropy of the whole distribution too.

    Returns:
        `logprobs` `[...]`, or `(logprobs, entropy)`, both `[...]` and both differentiable.

    Raises:
        ValueError: a shape, dtype or temperature that does not fit the above.
    """
    _check(hidden, weight, targets, bias, temperature)
    dtype = torch.float32
    for tensor in (hidden, weight, bias):
        dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
    # Autocast would run the matrix product in half precision behind our back.
    with torch.autocast(hidden.device.type, enabled=False):
        logits = F.linear(
            hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        )
        if temperature != 1.0:
            logits = logits / temperature
        if not entropy:
            # cross_entropy is PyTorch's fused log_softmax and gather. No index is to be ignored:
            # its default would answer 0 for a target of -100 where the docstring promises an error.
            flat = logits.reshape(-1, weight.shape[0])
            nll = F.cross_entropy(
                flat, targets.reshape(-1), reduction="none", ignore_index=_NO_INDEX
            )
            return -nll.reshape(targets.shape)
        logprobs = logits.log_softmax(-1)
        # A removed word has p = 0 and log p = -inf, and 0 * -inf is NaN: its term is 0.
        terms = logprobs.exp() * logprobs.clamp_min(torch.finfo(dtype).min)
        return logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1), -terms.sum(-1)


def _check(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float
) -> None:
    """Raise ValueError on what shapes, dtypes and the temperature alone can tell."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if hidden.ndim < 1 or weight.ndim != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            "hidden [..., H] and weight [V, H] must agree in H, "
            f"got hidden {list(hidden.shape)} and weight {list(weight.shape)}"
        )
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"targets must have hidden's leading shape {list(hidden.shape[:-1])}, "
            f"got {list(targets.shape)}: one target per hidden state"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape [{weight.shape[0]}], got {list(bias.shape)}")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64, got {targets.dtype}: call targets.long()")
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
