"""Who races in `moe-rl bench logprobs`: every way to get per-token log-probabilities at hand.

Each contestant is a function of hidden `[N, H]`, weight `[V, H]` and targets `[N]` that returns
differentiable log-probabilities `[N]`. One that cannot run here is listed with the reason.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_rl.kernels import token_logprobs

Contestant = Callable[[Tensor, Tensor, Tensor], Tensor]

OURS = "moe-rl"
MATERIALISED = ("materialised logits", "materialised, float32 softmax")
_TRL_CHUNK = 32768  # words; trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE of 1.16.0


def contestants(device: torch.device) -> tuple[dict[str, Contestant], dict[str, str]]:
    """Those that run here, ours first, and the reasons of the others."""
    running: dict[str, Contestant] = {}
    absent = {"quack": "its reductions are mean and sum: no number a token"}
    for name, make in _MAKERS.items():
        if name in _CUDA_ONLY and device.type != "cuda":
            absent[name] = "runs on a CUDA device only"
            continue
        try:
            contestant = make()
            _try(contestant, device)
        except ImportError as error:
            how = "make peers" if name == "verl" else "pip install 'moe-rl[bench]'"
            absent[name] = f"not installed ({error.name}): {how}"
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            absent[name] = (str(error).strip() or repr(error)).splitlines()[0]
        else:
            running[name] = contestant
    return running, absent


def _try(contestant: Contestant, device: torch.device) -> None:
    """One forward and backward on a small problem, so that a failure comes before the race."""
    hidden = torch.randn(8, 128, device=device, requires_grad=True)
    weight = torch.randn(512, 128, device=device, requires_grad=True)
    targets = torch.arange(8, device=device)
    logprobs = contestant(hidden, weight, targets)
    if logprobs.shape != (8,):
        raise ValueError(f"gives {list(logprobs.shape)} for 8 tokens, not one number a token")
    logprobs.sum().backward()


def _ours() -> Contestant:
    return lambda hidden, weight, targets: token_logprobs(hidden, weight, targets).logprobs


def _materialised() -> Contestant:
    return lambda h, w, t: -F.cross_entropy(F.linear(h, w), t, reduction="none")


def _materialised_float() -> Contestant:
    return lambda h, w, t: -F.cross_entropy(F.linear(h, w).float(), t, reduction="none")


def _torch() -> Contestant:
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda h, w, t: -F.linear_cross_entropy(h, w, t, reduction="none", options=options)


def _liger() -> Contestant:
    function = _member("liger_kernel.ops", "LigerFusedLinearScaledCrossEntropyFunction")

    def run(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        nll = function.apply(hidden, weight, targets)
        return -(nll[0] if isinstance(nll, tuple) else nll)

    return run


def _trl() -> Contestant:
    function = _member("trl.kernels", "ChunkedLogProbFunction")
    no_extras: tuple[str, ...] = ()
    return lambda h, w, t: function.apply(h, w, None, t, 1.0, _TRL_CHUNK, None, 1.0, no_extras)[0]


def _cut() -> Contestant:
    function = _member("cut_cross_entropy", "linear_cross_entropy")
    # Without its filter: the gradients that it leaves out depend on the data.
    return lambda h, w, t: -function(h, w, t, reduction="none", filter_eps=None)


def _verl() -> Contestant:
    function = _member("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy")
    return lambda h, w, t: function(h, w, t, 1.0, "none")[0]


def _member(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


_CUDA_ONLY = ("cut-cross-entropy", "verl")
_MAKERS: dict[str, Callable[[], Contestant]] = {
    OURS: _ours,
    MATERIALISED[0]: _materialised,
    MATERIALISED[1]: _materialised_float,
    "torch linear_cross_entropy": _torch,
    "Liger scaled cross entropy": _liger,
    "TRL chunked": _trl,
    "cut-cross-entropy": _cut,
    "verl": _verl,
}
