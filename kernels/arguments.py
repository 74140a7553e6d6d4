"""The arguments of `token_logprobs`: what shapes, dtypes and numbers alone can tell about them."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

NO_INDEX = torch.iinfo(torch.int64).min
"""An `ignore_index` that no target has: stands for None where an integer is needed."""

ZERO_LOG_P = -1e4
"""A log-probability whose exponential is 0 in float64 too, and whose multiples are finite."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """How hidden states become a distribution, apart from the matrix.

    scores = cap(hidden @ weight.T + bias) / temperature, cap(z) = softcap * tanh(z / softcap).
    """

    temperature: float | Tensor = 1.0
    """Softmax temperature: one positive number, or one a token, float `[N]`."""
    softcap: float | None = None
    """Bound of the logits, positive; None: unbounded."""
    ignore_index: int = NO_INDEX
    """Target of the tokens that do not count."""


def check_arguments(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    ignore_index: int | None,
) -> None:
    """Raise ValueError on what shapes, dtypes and numbers tell is wrong."""
    _check_layout(weight)
    if hidden.device.type == "meta":
        raise ValueError("hidden is on the meta device: it has no numbers; materialise the model")
    if hidden.ndim < 1 or weight.ndim != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            "hidden [..., H] and weight [V, H] must agree in H, "
            f"got hidden {list(hidden.shape)} and weight {list(weight.shape)}"
        )
    if 0 in weight.shape:
        raise ValueError(f"weight [V, H] must have a word and a width, got {list(weight.shape)}")
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
        if tensor is not None and tensor.dtype not in DTYPES:
            raise ValueError(f"{name} must be floating point of 16 to 64 bits, got {tensor.dtype}")
    for name, tensor in (("weight", weight), ("targets", targets), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device} and hidden on {hidden.device}")
    if softcap is not None and not _is_positive(softcap):
        raise ValueError(f"softcap must be positive and finite, or None, got {softcap!r}")
    if ignore_index is not None and not (
        isinstance(ignore_index, int) and NO_INDEX < ignore_index <= torch.iinfo(torch.int64).max
    ):
        raise ValueError(
            f"ignore_index must be a Python int of 64 bits or None, got {ignore_index!r}"
        )


def can_look(values: Tensor) -> bool:
    """Whether looking at values costs nothing: no GPU's queue drains and no graph breaks."""
    return values.device.type == "cpu" and not torch.compiler.is_compiling()


def check_words(targets: Tensor, vocab: int, head: Head) -> None:
    """Raise IndexError on a target that is no word, where looking costs nothing."""
    if not can_look(targets):
        return
    wrong = (targets < 0) | (targets >= vocab)
    ignores = head.ignore_index != NO_INDEX
    if ignores:
        wrong &= targets != head.ignore_index
    if bool(wrong.any()):
        raise IndexError(
            f"targets must lie in [0, {vocab}), got {int(targets[wrong][0])}; ignore_index="
            f"{head.ignore_index if ignores else None} marks tokens that do not count"
        )


def _is_positive(number: object) -> bool:
    try:
        return bool(0 < number < math.inf)  # type: ignore[operator]
    except TypeError:
        return False


def check_temperature(
    temperature: float | Tensor, targets: Tensor, ignore_index: int | None
) -> float | Tensor:
    """The temperature as a number, or as float32 or float64 `[N]` on the device of the targets.

    The values of a tensor are left alone: looking at them would drain a GPU's queue. Those of
    tokens that do not count are 1, whatever fills the padding.

    Raises:
        ValueError: not positive, not finite, or a tensor that is not one number a token.
    """
    if not isinstance(temperature, Tensor):
        if not _is_positive(temperature):
            raise ValueError(f"temperature must be positive and finite, got {temperature!r}")
        return float(temperature)
    if temperature.requires_grad:
        raise ValueError("temperature must not require a gradient: there is none; detach() it")
    if not temperature.is_floating_point() or temperature.shape not in ((), targets.shape):
        raise ValueError(
            f"temperature must be a float or a float tensor of targets' shape "
            f"{list(targets.shape)}, got {temperature.dtype} {list(temperature.shape)}"
        )
    dtype = torch.promote_types(torch.float32, temperature.dtype)
    spread = temperature.to(targets.device, dtype).expand(targets.shape)
    if ignore_index is not None:
        spread = spread.where(targets != ignore_index, 1)
    return spread.reshape(-1)


def dense_like(tensor: Tensor) -> Tensor:
    """An empty tensor row by row, however `tensor` lies: what compiled graphs are told of."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float32, or float64 as soon as one tensor is: the arithmetic whatever the inputs."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
    return dtype


def _check_layout(weight: Tensor) -> None:
    """Refuse a matrix of which this process holds a part only."""
    whole = tuple(getattr(weight, "ds_shape", weight.shape))
    if whole != tuple(weight.shape):
        raise ValueError(
            f"weight is partitioned by DeepSpeed ZeRO-3 (whole shape {whole}): "
            "gather it first, with deepspeed.zero.GatheredParameters([weight])"
        )
    if hasattr(weight, "full_tensor"):
        raise ValueError("weight is a DTensor: pass weight.full_tensor(), the whole matrix")
