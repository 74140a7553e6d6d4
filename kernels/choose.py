"""Which implementation of the token log-probabilities runs: the one decision point."""

import importlib.util
import os

import torch

from moe_rl.runtime.choice import Choice

BACKENDS = ("auto", "reference", "chunked", "triton")

SMALL_LOGITS = 2**18
"""Logits that are best materialised: 1 MiB in float32, a core's own cache. Measured on a CPU, the
chunked backend draws level there; a minibatch of the small study (V = 13) has a tenth of it."""


def choose_backend(
    requested: str = "auto",
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    num_tokens: int,
    vocab: int,
    autocast: bool = False,
) -> Choice:
    """The backend of one call of `token_logprobs`.

    Args:
        requested: `auto`, or a backend by name, which is then taken or refused, never replaced.
        device: device of the tensors.
        dtype: the widest dtype of hidden, weight and bias.
        num_tokens: N.
        vocab: V.
        autocast: whether torch.autocast is on, under which autograd's backward pass, too, would
            run in half precision.

    Raises:
        ValueError: an unknown name, or a backend that cannot run on this device and dtype.
    """
    kind = torch.device(device).type
    if requested != "auto":
        return named_backend(requested, BACKENDS, kind, dtype)
    few = num_tokens * vocab <= SMALL_LOGITS
    if few and not autocast:
        return Choice(
            "reference",
            f"N * V = {num_tokens * vocab} logits (at most {SMALL_LOGITS}) fit into a cache: "
            "materialising them is the fastest",
        )
    if kind != "cuda":
        if few:
            return Choice("chunked", "under torch.autocast it keeps its backward pass in float32")
        return Choice("chunked", f"on {kind}, vocabulary chunks bound the memory")
    obstacle = triton_obstacle(kind, dtype)
    if obstacle:
        return Choice("chunked", f"the Triton kernels cannot run: {obstacle}")
    return Choice("triton", "CUDA device and Triton: the fused kernels")


def named_backend(
    requested: str, known: tuple[str, ...], device_type: str, dtype: torch.dtype
) -> Choice:
    """A backend asked for by name, which is taken or refused, never replaced.

    Raises:
        ValueError: an unknown name, or a backend that cannot run on this device and dtype.
    """
    if requested not in known:
        raise ValueError(f"backend={requested!r}: unknown; choose from {', '.join(known)}")
    obstacle = triton_obstacle(device_type, dtype)
    if requested == "triton" and obstacle:
        raise ValueError(f"backend='triton': cannot run: {obstacle}")
    return Choice(requested, "asked for by name")


def triton_obstacle(device_type: str, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot run on this device and dtype; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (it ships with PyTorch for CUDA on Linux)"
    if dtype == torch.float64:
        return "its kernels compute in float32 and an input is float64; use backend='reference'"
    if device_type != "cuda" and not interpreting():
        return (
            f"the tensors are on {device_type}. Move them to a CUDA device, or set "
            "TRITON_INTERPRET=1 before Python starts to run the kernels in Triton's interpreter "
            "(slow, for tests)"
        )
    return None


def interpreting() -> bool:
    """Whether Triton's interpreter stands in for a GPU: TRITON_INTERPRET=1 in the environment."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
