"""Routing room: noise on the router's choice, as a dial for how much routing changes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .switchboard import tapped
from .taps import RouterTap
from .top_k import top_k

Draw = Callable[[int, Tensor], Tensor]

# Tokens compared to make sure that a router chooses in the order of its logits.
TOKENS_CHECKED = 64


class Noise:
    """Perturbs choices with `draw(layer, logits)`."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw
        self._checked: set[int] = set()

    def choose(self, layer: int, tap: RouterTap, scores: Tensor, logits: Tensor | None) -> Tensor:
        """Return `topk(logits + noise)` ids `[..., K]`."""
        if logits is None:
            raise _refusal(tap, "computes no logits by a product of E columns")
        logits = logits.detach()
        if layer not in self._checked:
            _require_order_of_logits(tap, scores, logits)
            self._checked.add(layer)
        noisy: Tensor = top_k(self.perturb(layer, tap, logits), tap.top_k).indices
        return noisy

    def perturb(self, layer: int, tap: RouterTap, logits: Tensor) -> Tensor:
        """Return `logits + noise`."""
        noise = self.draw(layer, logits)
        if not isinstance(noise, Tensor) or noise.shape != logits.shape:
            got = list(noise.shape) if isinstance(noise, Tensor) else type(noise).__name__
            raise ValueError(
                f"draw: returned {got} for the logits {list(logits.shape)} of layer {layer}. "
                "Return a tensor of noise of the shape of the logits."
            )
        return logits + noise


def _require_order_of_logits(tap: RouterTap, scores: Tensor, logits: Tensor) -> None:
    few_scores = scores.flatten(0, -2)[:TOKENS_CHECKED]
    few_logits = logits.flatten(0, -2)[:TOKENS_CHECKED]
    by_scores = few_logits.gather(-1, few_scores.topk(tap.top_k, dim=-1).indices)
    best = few_logits.topk(tap.top_k, dim=-1).values
    # Equal scores may come from logits that differ by rounding, hence a tolerance.
    if not torch.allclose(by_scores.sort(descending=True).values, best, rtol=1e-3, atol=1e-3):
        raise _refusal(tap, "does not choose the experts of the highest logits")


def _refusal(tap: RouterTap, why: str) -> ValueError:
    return ValueError(
        f"model: router noise is not defined for router {tap.name!r} "
        f"({type(tap.module).__name__}): it {why}, so topk(logits + noise) would not be a noisy "
        "version of its choice. Use a router that scores by a product and chooses by topk "
        "(Qwen3-MoE, OLMoE, Mixtral, DeepSeek-V3)."
    )


@contextmanager
def router_noise(model: nn.Module, draw: Draw) -> Iterator[None]:
    """Choose experts by noisy logits in every forward of the block.

        generator = torch.Generator().manual_seed(0)
        def draw(layer_index, logits):
            return 0.1 * torch.randn(logits.shape, generator=generator)
        with router_noise(model, draw): ...

    The choice is what the router itself chooses when it sees `logits + noise`: their K largest,
    or what its correction bias and its groups make of them (DeepSeek-V3). Only the choice is
    perturbed: gate weights are gathered from the clean scores. Under
    `replay_routing` the replayed ids win, and the noisy choice is what is reported as live and
    used where there is no record. Gradient checkpointing recomputes with the choice that was
    made, without drawing again.

    Args:
        model: a transformers MoE model.
        draw: `draw(layer_index, logits [N, E]) -> noise [N, E]`, called without gradients once
            for each router and forward; `layer_index` counts MoE layers, the L of a record.

    Raises:
        ValueError: a router chooses by a method of its own, or in another order than that of its
            logits; noise of another shape; or nested noise.
    """
    with tapped(model) as board:
        for tap in board.taps:
            if hasattr(tap.module, "select_experts"):
                raise _refusal(tap, "chooses by a method of its own")
        if board.noise is not None:
            raise ValueError("draw: this model has router noise already. Close that context first.")
        board.noise = Noise(draw)
        try:
            yield
        finally:
            board.noise = None
