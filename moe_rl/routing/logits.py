"""Routing room: the router logits of a forward with their graph, for losses on the routers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .router_call import RouterCall
from .taps import RouterTap, find_routers


@contextmanager
def collect_router_logits(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the raw logits `[..., E]` of each router of each forward in the block, in order.

    What a router chooses and returns stays as it is. Families whose forward does not hand out
    its router logits (DeepSeek-V3) are served like those that do.

    Raises:
        ValueError: the model has no router (see `find_routers`), or one that computes no product
            of width E.
    """
    found: list[Tensor] = []
    taps = find_routers(model)
    own = [tap.module.__dict__.get("forward") for tap in taps]
    for tap in taps:
        tap.module.forward = _listening(tap, tap.module.forward, found)
    try:
        yield found
    finally:
        for tap, forward in zip(taps, own, strict=True):
            if forward is None:
                del tap.module.forward
            else:
                tap.module.forward = forward


def _listening(
    tap: RouterTap, forward: Callable[..., Any], found: list[Tensor]
) -> Callable[..., Any]:
    def listen(*args: Any, **kwargs: Any) -> Any:
        call = RouterCall(tap)
        output = call.run(forward, args, kwargs)
        if call.logits is None:
            raise ValueError(
                f"model: router {tap.name!r} computes no product of width {tap.num_experts}, so it "
                "has no logits to balance. Set load_balance_coef to 0."
            )
        found.append(call.logits)
        return output

    return listen
