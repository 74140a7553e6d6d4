"""Float32 master weights: what an optimiser steps where a model's own weights are coarser.

Neighbouring bfloat16 numbers near w are |w| / 256 to |w| / 128 apart. At the learning rates of
reinforcement learning, about 1e-6, an update is smaller than half of that and rounds to nothing.
The float32 copy keeps it, and the model's weight moves once enough of them have added up (mixed
precision training, arXiv 1710.03740, section 3.1). A float32 weight is its own master.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class MasterWeights:
    """A model's trained parameters, each with the float32 parameter that is stepped for it.

    Args:
        parameters: those of the model, which may be sharded; the ones without gradient are left
            out.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.own = [parameter for parameter in parameters if parameter.requires_grad]
        self.masters = [
            own if own.dtype == torch.float32 else nn.Parameter(own.detach().float())
            for own in self.own
        ]

    @property
    def elements(self) -> int:
        """Weights in all, of this rank's shards where they are sharded."""
        return sum(_local(master).numel() for master in self.masters)

    @property
    def has_copies(self) -> bool:
        """Whether any weight is stepped through a copy."""
        return any(own is not master for own, master in zip(self.own, self.masters, strict=True))

    def exact(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A model's `state_dict(keep_vars=True)` with the masters in place of what they step."""
        master_of = {id(own): master for own, master in zip(self.own, self.masters, strict=True)}
        # By identity: tied weights are one parameter under two names.
        return {name: master_of.get(id(value), value).detach() for name, value in state.items()}

    def take_gradients(self) -> None:
        """Move the model's gradients to the masters: norms and clipping are then of float32."""
        for own, master in zip(self.own, self.masters, strict=True):
            if own is not master:
                master.grad = None if own.grad is None else own.grad.float()
                own.grad = None

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Step the masters and round them into the model."""
        optimizer.step()
        for own, master in zip(self.own, self.masters, strict=True):
            if own is not master:
                own.copy_(master)

    def copies(self) -> list[Tensor]:
        """The masters as they are now, of this rank's shards where they are sharded."""
        return [_local(master.detach()).clone() for master in self.masters]

    def count_moved(self, before: list[Tensor]) -> int:
        """How many of the masters of this rank differ from what `copies` gave before."""
        pairs = zip(self.masters, before, strict=True)
        moved = [torch.count_nonzero(_local(master.detach()) != old) for master, old in pairs]
        return int(torch.stack(moved).sum())


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
