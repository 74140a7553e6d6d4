"""Noise on the router's choice, as a dial for how much routing changes."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .switchboard import Draw, tapped


@contextmanager
def router_noise(model: nn.Module, draw: Draw) -> Iterator[None]:
    """Choose experts by noisy logits in every forward of the block.

        generator = torch.Generator().manual_seed(0)
        def draw(layer_index, logits):
            return 0.1 * torch.randn(logits.shape, generator=generator)
        with router_noise(model, draw): ...

    The choice is what the router itself chooses when it sees `logits + noise`: their K largest,
    or what its correction bias, its groups (DeepSeek-V3) or its `select_experts` make of them. Only
    the choice is perturbed: gate weights are gathered from the clean scores. Under
    `replay_routing` the replayed ids win, and the noisy choice is what is reported as live and
    used where there is no record. Gradient checkpointing recomputes with the choice that was
    made, without drawing again.

    Args:
        draw: `draw(layer_index, logits [N, E]) -> noise [N, E]`, called without gradients once
            for each router and forward; `layer_index` counts MoE layers, the L of a record.

    Raises:
        ValueError: a router computes no logits by a product of E columns; or nested noise.
    """
    with tapped(model) as board, board.hold("noise", draw):
        yield
