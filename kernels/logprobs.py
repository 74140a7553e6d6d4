"""`token_logprobs`, the one public function: checks its arguments, chooses a backend, calls it."""

from typing import NamedTuple

import torch
from torch import Tensor

from moe_rl.kernels.arguments import (
    NO_INDEX,
    HeadInputs,
    check_arguments,
    checked_positive,
    checked_temperature,
)
from moe_rl.kernels.choose import choose_backend
from moe_rl.kernels.reference import reference_logprobs


class TokenLogprobs(NamedTuple):
    """What `token_logprobs` returns: tensors of the targets' shape, float32 or float64."""

    logprobs: Tensor
    """nats, at most 0."""
    entropy: Tensor | None
    """nats; None unless asked for."""
    logsumexp: Tensor | None
    """nats; None unless asked for."""


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = -100,
    entropy: bool = False,
    return_lse: bool = False,
    backend: str = "auto",
) -> TokenLogprobs:
    """Log-probability of each target token under a language-model head, without storing logits.

        z = hidden @ weight.T + bias
        s = softcap * tanh(z / softcap) / temperature
        lse      = logsumexp(s)                         nats
        logprobs = s[targets] - lse                     nats
        entropy  = -sum_v p_v log p_v,  p = softmax(s)  nats

    `reference.py` is these lines in PyTorch; the other backends are tested against it. All
    arithmetic is in float32 (float64 as soon as one input is float64), whatever the dtype of the
    inputs and also under autocast (with `backend="reference"` the forward pass only; call backward
    outside of autocast, as PyTorch advises). A bfloat16 log-probability has steps of 2^-6 near -2,
    more than the width of GSPO's clip range.

    Args:
        hidden: `[..., H]`, floating point; the last hidden states, after the final norm.
        weight: `[V, H]`, floating point; the head's matrix.
        targets: `[...]`, int64 in `[0, V)` or `ignore_index`. Other values are an IndexError on a
            CPU, and a device-side assert or NaN on a GPU: looking at the values would drain its
            queue, and break a compiled graph.
        bias: `[V]` or None. Without softcap an entry of -inf removes a token.
        temperature: softmax temperature, positive and finite; a float, or one a token `[...]`.
        softcap: bound of the logits before the temperature (Gemma), positive; None: unbounded.
        ignore_index: tokens with this target get 0 for each output and give no gradient, whatever
            their hidden state holds, NaN included; None: every target is a token.
        entropy: also return the entropy of the whole distribution.
        return_lse: also return the logsumexp of the scores s.
        backend: `auto` (see `choose_backend`), `reference`, `chunked` or `triton`.

    Returns:
        Log-probabilities, and entropy and logsumexp where asked for, each `[...]`, float32 or
        float64; all are differentiable once, to hidden, weight and bias.

    Raises:
        ValueError: a shape, dtype, device or number that does not fit the above, a sharded
            weight, or a backend that cannot run here.
        IndexError: on a CPU, a target outside `[0, V)` that is not `ignore_index`.
    """
    check_arguments(hidden, weight, targets, bias)
    inputs = HeadInputs(
        hidden=hidden.reshape(-1, hidden.shape[-1]),
        weight=weight,
        targets=targets.reshape(-1),
        bias=bias,
        temperature=checked_temperature(temperature, targets, ignore_index),
        softcap=None if softcap is None else checked_positive("softcap", softcap),
        ignore_index=NO_INDEX if ignore_index is None else ignore_index,
    )
    choice = choose_backend(
        backend,
        device=hidden.device,
        dtype=inputs.dtype,
        num_tokens=inputs.targets.numel(),
        vocab=weight.shape[0],
        autocast=torch.is_autocast_enabled(hidden.device.type),
    )
    if choice.name == "reference":
        logprobs, spread, lse = reference_logprobs(inputs, entropy=entropy, lse=return_lse)
    else:
        from moe_rl.kernels.fused import fused_logprobs

        logprobs, spread, lse = fused_logprobs(inputs, entropy=entropy, backend=choice.name)
    return TokenLogprobs(
        logprobs=logprobs.reshape(targets.shape),
        entropy=None if spread is None else spread.reshape(targets.shape),
        logsumexp=None if lse is None or not return_lse else lse.reshape(targets.shape),
    )
