"""Problems for the tests of `token_logprobs`: inputs, float64 truth, and PyTorch's own error."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_rl.kernels import token_logprobs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FUSED = ("chunked", "triton")
NAMES = ("logprobs", "entropy", "lse", "d hidden", "d weight", "d bias")


@dataclass(frozen=True)
class Problem:
    """hidden [N, H], weight [V, H], targets [N], bias [V], upstream gradients [3, N], settings."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None
    upstream: Tensor
    settings: dict[str, Any]

    def to(self, dtype: torch.dtype) -> "Problem":
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(self, hidden=self.hidden.to(dtype), weight=self.weight.to(dtype), bias=bias)

    def rows(self, rows: slice | Tensor) -> "Problem":
        settings = {
            name: value[rows] if isinstance(value, Tensor) else value
            for name, value in self.settings.items()
        }
        return replace(
            self,
            hidden=self.hidden[rows],
            targets=self.targets[rows],
            upstream=self.upstream[:, rows],
            settings=settings,
        )


def problem(
    tokens: int,
    width: int,
    vocab: int,
    *,
    scale: float = 1.0,
    bias: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Problem:
    """Random inputs whose logits have about the standard deviation `scale`."""
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=draw) * scale
    weight = torch.randn(vocab, width, generator=draw) / width**0.5
    return Problem(
        hidden=hidden.to(dtype).to(DEVICE),
        weight=weight.to(dtype).to(DEVICE),
        targets=torch.randint(vocab, (tokens,), generator=draw).to(DEVICE),
        bias=torch.randn(vocab, generator=draw).to(dtype).to(DEVICE) if bias else None,
        upstream=torch.randn(3, tokens, generator=draw).to(DEVICE),
        settings=settings,
    )


def logprobs_of(*inputs: Tensor, **settings: Any) -> Tensor:
    """The log-probabilities alone."""
    return token_logprobs(*inputs, **settings).logprobs


def solve(p: Problem, backend: str, *, entropy: bool = True) -> dict[str, Tensor]:
    """Outputs and gradients of one call; the loss weighs each output of each token differently."""
    leaves = [
        None if t is None else t.detach().clone().requires_grad_()
        for t in (p.hidden, p.weight, p.bias)
    ]
    hidden, weight, bias = leaves
    assert hidden is not None and weight is not None
    settings = p.settings | {"bias": bias, "entropy": entropy, "return_lse": True}
    found = token_logprobs(hidden, weight, p.targets, backend=backend, **settings)
    outputs = [out for out in found if out is not None]
    upstream = p.upstream if entropy else p.upstream[[0, 2]]
    sum((out * up).sum() for out, up in zip(outputs, upstream, strict=True)).backward()
    names = NAMES if entropy else ("logprobs", "lse", *NAMES[3:])
    results = [*(out.detach() for out in outputs), hidden.grad, weight.grad]
    return dict(zip(names, results if bias is None else [*results, bias.grad], strict=False))


def truth(p: Problem, *, entropy: bool = True) -> dict[str, Tensor]:
    """The definition in float64 on the same numbers."""
    return solve(p.to(torch.float64), "reference", entropy=entropy)


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Root mean square over all numbers of each result; a NaN stays one."""
    return {
        name: (found[name].double() - exact[name].double()).square().mean().sqrt().item()
        for name in exact
    }


def plain_torch(p: Problem) -> dict[str, Tensor]:
    """What PyTorch gives in the dtype of the inputs: materialised logits and autograd."""
    hidden, weight = (t.detach().clone().requires_grad_() for t in (p.hidden, p.weight))
    bias = None if p.bias is None else p.bias.detach().clone().requires_grad_()
    scores = F.linear(hidden, weight, bias)
    softcap = p.settings.get("softcap")
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    temperature = p.settings.get("temperature", 1.0)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(scores.dtype).unsqueeze(-1)
    log_p = (scores / temperature).log_softmax(-1)
    outputs = (
        log_p.gather(-1, p.targets.unsqueeze(-1)).squeeze(-1),
        -(log_p.exp() * log_p).sum(-1),
        (scores / temperature).logsumexp(-1),
    )
    sum((out * up).sum() for out, up in zip(outputs, p.upstream, strict=True)).backward()
    found = [*(out.detach() for out in outputs), hidden.grad, weight.grad]
    return dict(zip(NAMES, found if bias is None else [*found, bias.grad], strict=False))


def assert_as_exact_as_torch(p: Problem, backend: str) -> None:
    """At most twice the error of PyTorch in the same dtype, plus half a rounding of the largest."""
    exact, ours, theirs = truth(p), solve(p, backend), plain_torch(p)
    ours_off, theirs_off = errors(ours, exact), errors(theirs, exact)
    for name, error in ours_off.items():
        rounding = torch.finfo(ours[name].dtype).eps * exact[name].abs().max().item()
        assert error <= 2 * theirs_off[name] + rounding / 2, (name, error, theirs_off[name])
