"""The arguments of `token_logprobs`: their checks, and the form in which the backends take them."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

NO_INDEX = torch.iinfo(torch.int64).min
"""An `ignore_index` that no target has: stands for None where an integer is needed."""

ZERO_LOG_P = -1e4
"""A log-probability whose exponential is 0 in float64 too, and whose multiples are finite."""


class HeadInputs(NamedTuple):
    """What every backend takes: the arguments of `token_logprobs`, checked, over N tokens."""

    hidden: Tensor
    """`[N, H]`."""
    weight: Tensor
    """`[V, H]`."""
    targets: Tensor
    """int64 `[N]`."""
    bias: Tensor | None
    """`[V]`."""
    temperature: float | Tensor
    """One positive number, or one a token, float `[N]`."""
    softcap: float | None
    ignore_index: int
    """Target of the tokens that do not count; `NO_INDEX`: all count."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the arithmetic: float32, or float64 as soon as one tensor is."""
        return compute_dtype(self.hidden, self.weight, self.bias)


def check_arguments(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError if a shape, dtype or device does not fit, or the weight is a shard."""
    sharded = tuple(getattr(weight, "ds_shape", weight.shape)) != tuple(weight.shape)
    if sharded or hasattr(weight, "full_tensor"):
        raise ValueError(
            "weight: this process holds only a shard of it; gather it first, with "
            "deepspeed.zero.GatheredParameters([weight]) or weight.full_tensor()"
        )
    if weight.ndim != 2 or hidden.shape[-1:] != weight.shape[1:]:
        raise ValueError(
            f"hidden={list(hidden.shape)}, weight={list(weight.shape)}: must be [..., H] and "
            "[V, H] with the same H"
        )
    for name, tensor, shape, dtypes in (
        ("hidden", hidden, hidden.shape, FLOATS),
        ("weight", weight, weight.shape, FLOATS),
        ("targets", targets, hidden.shape[:-1], (torch.int64,)),
        ("bias", bias, weight.shape[:1], FLOATS),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape or tensor.dtype not in dtypes or tensor.device != hidden.device:
            raise ValueError(
                f"{name}={tensor.dtype} {list(tensor.shape)} on {tensor.device}: must have shape "
                f"{list(shape)}, be on {hidden.device} and one of {', '.join(map(str, dtypes))}"
            )


def can_look(values: Tensor) -> bool:
    """Whether looking at values costs nothing: no GPU's queue drains and no graph breaks."""
    return values.device.type == "cpu" and not torch.compiler.is_compiling()


def check_targets(inputs: HeadInputs) -> None:
    """Raise IndexError on a target that is no word, where looking costs nothing."""
    targets, vocab = inputs.targets, len(inputs.weight)
    if not can_look(targets):
        return
    wrong = (targets < 0) | (targets >= vocab)
    if inputs.ignore_index != NO_INDEX:
        wrong &= targets != inputs.ignore_index
    if bool(wrong.any()):
        ignored = None if inputs.ignore_index == NO_INDEX else inputs.ignore_index
        raise IndexError(
            f"targets={int(targets[wrong][0])}: must lie in [0, {vocab}), or be the ignore_index, "
            f"which is {ignored}"
        )


def checked_temperature(
    temperature: float | Tensor, targets: Tensor, ignore_index: int | None
) -> float | Tensor:
    """The temperature as a number, or as float32 or float64 `[N]` on the device of the targets.

    The values of a tensor are not checked: looking at them would drain a GPU's queue. Those of
    tokens that do not count become 1, whatever fills the padding.

    Raises:
        ValueError: not a positive finite number, nor a tensor of one number a token.
    """
    if not isinstance(temperature, Tensor):
        return checked_positive("temperature", temperature)
    floating = temperature.is_floating_point() and not temperature.requires_grad
    if not floating or temperature.shape not in ((), targets.shape):
        raise ValueError(
            f"temperature={temperature.dtype} {list(temperature.shape)}: must be a float, or a "
            f"float tensor of the targets' shape {list(targets.shape)} without a gradient"
        )
    dtype = torch.promote_types(torch.float32, temperature.dtype)
    spread = temperature.to(targets.device, dtype).expand(targets.shape)
    if ignore_index is not None:
        spread = spread.where(targets != ignore_index, 1)
    return spread.reshape(-1)


def checked_positive(name: str, number: float) -> float:
    """The number as a float.

    Raises:
        ValueError: it is not positive and finite.
    """
    if not 0 < number < math.inf:
        raise ValueError(f"{name}={number!r}: must be positive and finite")
    return float(number)


def dense_like(tensor: Tensor) -> Tensor:
    """An uninitialised contiguous tensor like `tensor`: the strides promised to torch.compile."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float32, or float64 as soon as one tensor is: the arithmetic whatever the inputs."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
    return dtype
