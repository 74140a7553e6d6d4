"""Peak memory of a call beyond its inputs, outputs and gradients, on a GPU or a Linux CPU."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): sets VmHWM to the current resident size


def peak_bytes(
    run: Callable[[], Tensor], leaves: tuple[Tensor, ...], device: torch.device
) -> int | None:
    """Bytes at the peak of `run` above those before it, its output and the leaves' gradients.

    On a CPU these are resident pages, whoever asked for them; None where the system does not tell.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        output = run()
        peak = torch.cuda.max_memory_allocated(device)
    else:
        before_or_none = _resident("VmRSS", reset=True)
        if before_or_none is None:
            return None
        before = before_or_none
        output = run()
        peak = _resident("VmHWM") or before
    wanted = [output, *(leaf.grad for leaf in leaves if leaf.grad is not None)]
    return max(0, peak - before - sum(t.numel() * t.element_size() for t in wanted))


def _resident(field: str, *, reset: bool = False) -> int | None:
    """A field of /proc/self/status in bytes; `reset` first gives free pages back."""
    if not _STATUS.exists() or not _CLEAR.exists():
        return None
    if reset:
        # Pages that the C library keeps for later would hide the next call's.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        _CLEAR.write_text(_RESET_PEAK)
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(lines[field].split()[0]) * 1024
