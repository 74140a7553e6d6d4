"""The megablocks package: whether it can run here, why not, and how it is imported.

    make megablocks        installs it beside the pinned torch

megablocks 0.10.0 pins torch < 2.7.1 and numpy < 2.1, which its code does not need: it is installed
with `--no-deps`. Its layers refuse current Triton, so only `megablocks.ops` and `stk.ops` are used.
"""

import functools
import importlib.metadata
import importlib.util
import warnings
from types import ModuleType
from typing import Any, NamedTuple

import torch

from moe_rl.experts import megablocks_ops
from moe_rl.kernels.choose import interpreting

# Their autotuners time each variant on a GPU, of which the interpreter has none.
AUTOTUNED = ("_padded_copy", "_padded_copy_wgrad", "_binned_copy", "_binned_copy_wgrad")


class Package(NamedTuple):
    """What is used of megablocks and of stk, its block-sparse matrices."""

    ops: ModuleType
    """megablocks.ops: sort, histogram, gather, scatter and their padded kin."""
    stk: ModuleType
    """stk, with stk.ops.sdd and stk.ops.dsd."""


def problem(device: torch.device | str) -> str | None:
    """Why Megablocks experts cannot run on `device`, with the way out; None if they can."""
    for package in ("triton", "stk", "megablocks"):
        if importlib.util.find_spec(package) is None:
            return f"the package {package} is not installed; run `make megablocks`"
    if torch.device(device).type == "cpu" and not interpreting():
        return (
            "on a CPU its Triton kernels run in the interpreter only (slow): start with "
            "TRITON_INTERPRET=1 in the environment, or use grouped_mm"
        )
    return None


def extension() -> str:
    """Which `megablocks_ops` is used."""
    if megablocks_ops.is_compiled():
        return "compiled extension"
    return "torch stand-in for its compiled extension"


def describe(device: torch.device) -> str:
    """A line for `moe-rl doctor`."""
    why_not = problem(device)
    if why_not is not None:
        return f"cannot run on {device.type}: {why_not}"
    how = ", Triton interpreter" if interpreting() else ""
    return f"{importlib.metadata.version('megablocks')} with the {extension()}{how}"


@functools.cache
def load() -> Package:
    """Import the package, once.

    Raises:
        ValueError: it is not installed.
    """
    if importlib.util.find_spec("megablocks") is None or importlib.util.find_spec("stk") is None:
        raise ValueError("megablocks is not installed: run `make megablocks`")
    megablocks_ops.install()
    with warnings.catch_warnings():
        # It says at import that grouped_gemm is absent; `grouped_product` needs it nowhere.
        warnings.simplefilter("ignore")
        ops = importlib.import_module("megablocks.ops")
        stk = importlib.import_module("stk")
        importlib.import_module("stk.ops")
        kernels: Any = importlib.import_module("megablocks.backend.kernels")
    if interpreting():
        for name in AUTOTUNED:
            kernel = getattr(kernels, name)
            kernel.configs = kernel.configs[-1:]
    return Package(ops, stk)
