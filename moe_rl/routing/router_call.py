"""Routing room: run one router and listen to, or answer, its choice of experts.

The router's own `forward` runs under a TorchFunctionMode. Its final `topk` over the experts is
either left alone and noted, or answered with `(x.gather(-1, ids), ids)` where x are the scores the
router was about to choose from. Scoring, normalisation, bias and scaling stay the model's own
code, and the gate weights are gathered from the FULL scores, so the router receives the gradient
it would receive had it chosen those ids itself. Of a router that is a `ChoosesExperts`, the method
`select_experts` is answered instead.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .taps import RouterTap
from .top_k import top_k

_TOPKS = frozenset({torch.topk, Tensor.topk, top_k})
_PRODUCTS = frozenset(
    {
        torch.nn.functional.linear,
        torch.matmul,
        torch.mm,
        torch.addmm,
        Tensor.matmul,
        Tensor.mm,
        Tensor.__matmul__,
    }
)

Decide = Callable[[Tensor, Tensor | None, Callable[[], Tensor]], Tensor]


class RouterCall(TorchFunctionMode):
    """One call of one router.

    Args:
        tap: the router.
        decide: given the scores `x [..., E]`, the raw logits `[..., E]` (None if the router
            computed no product of width E) and a function that makes the router's own choice,
            return the ids `[..., K]` to choose. None leaves the router's own choice.
        ids: ids `[..., K]` fixed before the call. Needed by group-limited routers, whose choice
            of groups comes first: the groups of the ids must be open, or their scores are masked
            away and neither weights nor gradients survive.
        perturb: given the raw logits `[..., E]`, what the router is to see in their place;
            `logits` keeps the raw ones.
    """

    def __init__(
        self,
        tap: RouterTap,
        *,
        decide: Decide | None = None,
        ids: Tensor | None = None,
        perturb: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.tap = tap
        self.decide = decide
        self.ids = ids
        self.perturb = perturb
        self.logits: Tensor | None = None
        self.chosen: Tensor | None = None
        self._has_method = hasattr(type(tap.module), "select_experts")

    def run(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call the router; afterwards `chosen` holds its ids and `logits` its raw logits."""
        with self, self._answering_method():
            output = forward(*args, **kwargs)
        if self.chosen is None:
            call = "select_experts" if self._has_method else f"topk(k={self.tap.top_k})"
            raise ValueError(
                f"model: router {self.tap.name!r} ({type(self.tap.module).__name__}) did not call "
                f"{call} over {self.tap.num_experts} experts, so its choice can "
                "be neither recorded nor replayed. Give it the method of ChoosesExperts."
            )
        return output

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.chosen is None:
            if func in _TOPKS and not self._has_method:
                return self._topk(func, args, kwargs)
            if func in _PRODUCTS:
                product = func(*args, **kwargs)
                if product.shape[-1] != self.tap.num_experts:
                    return product
                self.logits = product
                return product if self.perturb is None else self.perturb(product)
        return func(*args, **kwargs)

    def _topk(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        scores: Tensor = args[0] if args else kwargs["input"]
        k = args[1] if len(args) > 1 else kwargs["k"]
        if self._chooses_experts(scores, k):
            if self.ids is None and self.decide is None:
                own = func(*args, **kwargs)
                self.chosen = own.indices
                return own
            chosen = self._choose(scores, lambda: func(*args, **kwargs).indices)
            return torch.return_types.topk((scores.gather(-1, chosen), chosen))
        if self.ids is not None and self._chooses_groups(scores):
            assert self.tap.num_groups is not None
            groups = self.ids.view(scores.shape[0], -1) // (
                self.tap.num_experts // self.tap.num_groups
            )
            return torch.return_types.topk((scores.gather(-1, groups), groups))
        return func(*args, **kwargs)

    def _choose(self, scores: Tensor, own: Callable[[], Tensor]) -> Tensor:
        with torch.no_grad():
            if self.ids is not None:
                ids = self.ids.view(*scores.shape[:-1], self.tap.top_k)
            elif self.decide is not None:
                ids = self.decide(scores, self.logits, own)
            else:
                ids = own()
        self.chosen = ids
        return ids

    @contextlib.contextmanager
    def _answering_method(self) -> Iterator[None]:
        module: Any = self.tap.module
        if not self._has_method:
            yield
            return
        select = module.select_experts
        module.select_experts = lambda scores: self._choose(scores, lambda: select(scores))
        try:
            yield
        finally:
            del module.select_experts

    def _chooses_experts(self, scores: Tensor, k: int) -> bool:
        # A group-limited router also scores its groups by a topk over [tokens, groups, E/groups],
        # which for one group has the width and the k of the choice itself.
        return (
            k == self.tap.top_k
            and scores.shape[-1] == self.tap.num_experts
            and (self.tap.num_groups is None or scores.ndim == 2)
        )

    def _chooses_groups(self, scores: Tensor) -> bool:
        return scores.ndim == 2 and scores.shape[-1] == self.tap.num_groups
