"""The fused backends as PyTorch operators: one forward, one backward, whatever the backend.

As operators they are opaque to `torch.compile`, which would otherwise unroll the loops over the
vocabulary and turn Python floats into float64.
"""

from typing import Any

import torch
from torch import Tensor

from moe_rl.kernels.arguments import HeadInputs, check_targets, compute_dtype, dense_like
from moe_rl.kernels.chunked import chunked_backward, chunked_forward


def fused_logprobs(
    inputs: HeadInputs, *, entropy: bool, backend: str
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`(logprobs, entropy, lse)`, each `[N]`, by the backend `chunked` or `triton`."""
    hidden, weight, targets, bias, temperature, softcap, ignore_index = inputs
    # Dense: the kernels read N temperatures and V biases in a row.
    varying = temperature.contiguous() if isinstance(temperature, Tensor) else None
    bias = None if bias is None else bias.contiguous()
    constant = 1.0 if isinstance(temperature, Tensor) else temperature
    logprobs, spread, lse = _forward(
        *(hidden, weight, targets, bias, constant, varying),
        *(softcap, ignore_index, entropy, backend),
    )
    return logprobs, spread if entropy else None, lse.to(logprobs.dtype)


@torch.library.custom_op("moe_rl::token_logprobs", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float | None,
    ignore_index: int,
    entropy: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logprobs, entropy (empty unless asked for) and lse in float64, for the backward pass."""
    heat = temperature if temperatures is None else temperatures
    inputs = HeadInputs(hidden, weight, targets, bias, heat, softcap, ignore_index)
    check_targets(inputs)  # inside the operator, so that a compiled call checks them as well
    with torch.autocast(hidden.device.type, enabled=False):
        return _implementation(backend)[0](inputs, entropy=entropy)


@_forward.register_fake
def _(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *rest: Any) -> Any:
    entropy = rest[-2]
    dtype = compute_dtype(hidden, weight, bias)
    logprobs = targets.new_empty(targets.shape, dtype=dtype)
    spread = targets.new_empty(targets.shape if entropy else (0,), dtype=dtype)
    return logprobs, spread, torch.empty_like(logprobs, dtype=torch.float64)


@torch.library.custom_op("moe_rl::token_logprobs_backward", mutates_args=())
def _backward(
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    grad_lse: Tensor | None,
    logprobs: Tensor,
    spread: Tensor,
    lse: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float | None,
    ignore_index: int,
    backend: str,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to hidden, weight and bias; those that are not wanted are empty."""
    heat = temperature if temperatures is None else temperatures
    inputs = HeadInputs(hidden, weight, targets, bias, heat, softcap, ignore_index)
    with torch.autocast(hidden.device.type, enabled=False):
        grads = _implementation(backend)[1](
            (grad_logprobs, grad_entropy, grad_lse),
            (logprobs, spread, lse),
            inputs,
            wanted=(wanted[0], wanted[1], wanted[2]),
        )
    to_hidden, to_weight, to_bias = (hidden.new_empty(0) if g is None else g for g in grads)
    return to_hidden, to_weight, to_bias


@_backward.register_fake
def _(*arguments: Any) -> Any:
    hidden, weight, bias, wanted = arguments[6], arguments[7], arguments[9], arguments[-1]
    return tuple(
        dense_like(tensor) if want else hidden.new_empty(0)
        for tensor, want in zip((hidden, weight, bias), wanted, strict=True)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, targets, bias, temperature, temperatures, softcap, ignore, _, backend = inputs
    ctx.save_for_backward(*output, hidden, weight, targets, bias, temperatures)
    ctx.settings = (temperature, softcap, ignore, backend)
    # An output that the loss does not use then costs nothing in the backward pass.
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    logprobs, spread, lse, hidden, weight, targets, bias, temperatures = ctx.saved_tensors
    temperature, softcap, ignore_index, backend = ctx.settings
    wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]]
    found = _backward(
        *grads,
        *(logprobs, spread, lse, hidden, weight, targets, bias),
        *(temperature, temperatures, softcap, ignore_index, backend, wanted),
    )
    to_hidden, to_weight, to_bias = (
        grad if want else None for grad, want in zip(found, wanted, strict=True)
    )
    return to_hidden, to_weight, None, to_bias, None, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def _differentiate_twice(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        "token_logprobs: the fused backends are differentiable once; for second derivatives use "
        "backend='reference'"
    )


_backward.register_autograd(_differentiate_twice)


def _implementation(backend: str) -> tuple[Any, Any]:
    if backend == "triton":
        from moe_rl.kernels.triton_backward import triton_backward
        from moe_rl.kernels.triton_logprobs import triton_forward

        return triton_forward, triton_backward
    assert backend == "chunked", backend
    return chunked_forward, chunked_backward
