"""Run one router and listen to, or answer, its choice of experts.

The router's own `forward` runs under a TorchFunctionMode. Its final `topk` over the experts is
either left alone and noted, or answered with `(x.gather(-1, ids), ids)` where x are the scores the
router was about to choose from. Scoring, normalisation, bias and scaling stay the model's own
code, and the gate weights are gathered from the FULL scores, so the router receives the gradient
it would receive had it chosen those ids itself. Of a router that is a `ChoosesExperts`, the method
`select_experts` is answered instead.

What a router returns is looked at only where its gate weights are asked for (`gate_weights.py`).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from .gate_weights import find_gate_weights
from .taps import ROUTING_METHOD, RouterTap
from .top_k import top_k

_TOPKS = frozenset({torch.topk, Tensor.topk, top_k})
_PRODUCTS = frozenset(
    {linear, torch.matmul, torch.mm, torch.addmm, Tensor.matmul, Tensor.mm, Tensor.__matmul__}
)


class RouterCall(TorchFunctionMode):
    """One call of one router. Afterwards `chosen` holds its ids, `logits` its raw logits.

    `scores` hold what it chose from, `[..., E]`: with bias, and 0 or -inf in groups that are shut.

    Args:
        tap: the router.
        decide: given a function that makes the router's own choice, return the ids `[..., K]` to
            choose; `logits` are known by then. None leaves the router's own choice.
        ids: ids `[..., K]` fixed before the call. Needed by group-limited routers, whose choice
            of groups comes first: the groups of the ids must be open, or their scores are masked
            away and neither weights nor gradients survive.
        perturb: given the raw logits `[..., E]`, what the router is to see in their place.
        weigh: given the router's own gate weights `[N, K]`, those to use; the same to keep them.
    """

    def __init__(
        self,
        tap: RouterTap,
        *,
        decide: Callable[[Callable[[], Tensor]], Tensor] | None = None,
        ids: Tensor | None = None,
        perturb: Callable[[Tensor], Tensor] | None = None,
        weigh: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.tap = tap
        self.decide = decide
        self.ids = ids
        self.perturb = perturb
        self.weigh = weigh
        self.logits: Tensor | None = None
        self.scores: Tensor | None = None
        self.chosen: Tensor | None = None

    def run(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call the router."""
        module: Any = self.tap.module
        inside = self.weigh is not None and hasattr(type(module), ROUTING_METHOD)
        if self.tap.has_method:
            select = module.select_experts
            module.select_experts = lambda scores: self._choose(scores, lambda: select(scores))
        if inside:
            route = getattr(module, ROUTING_METHOD)
            setattr(module, ROUTING_METHOD, lambda *a, **k: self._weighed(route(*a, **k)))
        try:
            with self:
                output = forward(*args, **kwargs)
        finally:
            if self.tap.has_method:
                del module.select_experts
            if inside:
                delattr(module, ROUTING_METHOD)
        if self.chosen is None:
            call = "select_experts" if self.tap.has_method else f"topk(k={self.tap.top_k})"
            raise ValueError(
                f"model: router {self.tap.name!r} ({type(module).__name__}) did not call {call} "
                f"over {self.tap.num_experts} experts, so its choice can be neither recorded nor "
                "replayed; give it the method of moe_rl.routing.ChoosesExperts"
            )
        return output if inside else self._weighed(output)

    def raw_logits(self) -> Tensor:
        """The raw logits `[..., E]`, for a context that cannot do without them."""
        if self.logits is None:
            raise ValueError(
                f"model: router {self.tap.name!r} computes no product of {self.tap.num_experts} "
                "columns, so it has no raw logits to keep, balance or perturb; leave "
                "router_logits, load_balance_coef and router_noise off"
            )
        return self.logits

    def _weighed(self, output: Any) -> Any:
        """What the router returned, with the gate weights to use."""
        if self.weigh is None or self.chosen is None:
            return output
        own, put = find_gate_weights(self.tap, output, self.chosen, self.logits)
        weights = self.weigh(own)
        return output if weights is own else put(weights)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.chosen is None:
            if func in _TOPKS and not self.tap.has_method:
                return self._topk(func, args, kwargs)
            if func in _PRODUCTS:
                return self._product(func(*args, **kwargs))
        return func(*args, **kwargs)

    def _product(self, product: Tensor) -> Tensor:
        experts, width = self.tap.num_experts, product.shape[-1]
        # Inkling's router scores its shared experts too, in the last columns.
        if width not in (experts, getattr(self.tap.module, "n_total_experts", experts)):
            return product
        self.logits = product[..., :experts] if width > experts else product
        if self.perturb is None:
            return product
        noisy = self.perturb(self.logits)
        return torch.cat([noisy, product[..., experts:]], -1) if width > experts else noisy

    def _topk(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        scores: Tensor = args[0] if args else kwargs["input"]
        k = args[1] if len(args) > 1 else kwargs["k"]
        tap = self.tap
        # A group-limited router also scores its groups by a topk over [tokens, groups, E/groups],
        # which for one group has the width and the k of the choice itself.
        plain = tap.num_groups is None or scores.ndim == 2
        if plain and k == tap.top_k and scores.shape[-1] == tap.num_experts:
            self.scores = scores.detach()
            if self.ids is None and self.decide is None:
                own = func(*args, **kwargs)
                self.chosen = own.indices
                return own
            chosen = self._choose(scores, lambda: func(*args, **kwargs).indices)
            return torch.return_types.topk((scores.gather(-1, chosen), chosen))
        if self.ids is not None and plain and scores.shape[-1] == tap.num_groups:
            groups = self.ids.view(scores.shape[0], -1) // (tap.num_experts // tap.num_groups)
            return torch.return_types.topk((scores.gather(-1, groups), groups))
        return func(*args, **kwargs)

    def _choose(self, scores: Tensor, own: Callable[[], Tensor]) -> Tensor:
        with torch.no_grad():
            if self.ids is not None:
                ids = self.ids.view(*scores.shape[:-1], self.tap.top_k)
            else:
                ids = own() if self.decide is None else self.decide(own)
        self.chosen = ids
        return ids
