"""One policy on several ranks, by PyTorch's own DistributedDataParallel or FSDP2.

Both act when the module that they wrap is called, while our passes are functions that call parts of
the policy. `_Inside`, a module whose forward runs any function, joins the two.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from moe_rl.runtime.ranks import Ranks
from moe_rl.runtime.strict import ConfigError

T = TypeVar("T")
Parallelism = Literal["ddp", "fsdp"]


def check_can_be_sharded(model: Any) -> None:
    """Refuse a model whose layers hold trained parameters of two types, which FSDP2 cannot shard.

    Raises:
        ConfigError: it has such parameters, as families in bfloat16 that keep some in float32.
    """
    kinds = {p.dtype: name for name, p in model.named_parameters() if p.requires_grad}
    if len(kinds) > 1:
        raise ConfigError(
            f"parallelism='fsdp': {type(model).__name__} has parameters of several types, such as "
            f"{' and '.join(f'{name} in {dtype}' for dtype, name in kinds.items())}, which FSDP "
            "cannot shard together; use ddp, or dtype=float32"
        )


class _Inside(nn.Module):
    """Runs functions of a model as if they were its forward."""

    def __init__(self, model: nn.Module, head: nn.Module | None) -> None:
        super().__init__()
        self.model, self.head = model, head

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)


class Wrapped:
    """Runs a model's passes so that gradients are averaged over the ranks; one wraps nothing.

    `ddp` keeps the whole model on each rank, `fsdp` a shard of every layer, made in place. A `head`
    is a module beside the model that passes may call too. `unused`: some parameters get no
    gradient.
    """

    def __init__(
        self,
        model: Any,
        ranks: Ranks,
        parallelism: Parallelism,
        head: nn.Module | None = None,
        *,
        unused: bool = False,
    ) -> None:
        self.ranks = ranks
        self._inside: nn.Module = _Inside(model, head)
        self._sharded: list[FSDPModule] = []
        if ranks.size == 1:
            return
        if parallelism == "ddp":
            # Buffers are equal on all ranks, and nothing here changes them. DDP would wait for the
            # gradients of unused parameters; to look for them where there are none makes it warn.
            self._inside = DistributedDataParallel(
                self._inside, broadcast_buffers=False, find_unused_parameters=unused
            )
            return
        mesh = init_device_mesh(model.device.type, (ranks.size,))
        for layer in getattr(model.base_model, "layers", ()):
            self._sharded.append(fully_shard(layer, mesh=mesh))
        if head is not None:  # a group of its own: its dtype may be another than the model's
            self._sharded.append(fully_shard(head, mesh=mesh))
        self._sharded.append(fully_shard(self._inside, mesh=mesh))

    def run(self, function: Callable[..., T], *args: Any) -> T:
        """Return function(*args), which may call the model and any part of it."""
        result: T = self._inside(function, *args)
        return result

    def backward(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around a forward and backward pass; gradients are exchanged in an update's last one."""
        if isinstance(self._inside, DistributedDataParallel) and not last:
            return self._inside.no_sync()
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def unsharded(self) -> Iterator[None]:
        """Gather the whole model on each rank: ranks may then make different numbers of passes."""
        for module in self._sharded:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield
        finally:
            for module in self._sharded:
                module.set_reshard_after_forward(module is not self._sharded[-1], recurse=False)
                module.reshard()


def whole_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor; where it is sharded, all ranks must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, sharded: Tensor) -> Tensor:
    """This rank's shard of a whole tensor, where `sharded` is a DTensor of its shape."""
    if not isinstance(sharded, DTensor) or tensor.shape != sharded.shape:
        return tensor
    whole = tensor.to(sharded.device)
    # Every rank has it whole: nothing is sent.
    return distribute_tensor(whole, sharded.device_mesh, sharded.placements, src_data_rank=None)


def clip_gradients(parameters: list[nn.Parameter], most: float) -> float:
    """Scale gradients to a norm of at most `most`; return their norm before, over all ranks."""
    return whole_tensor(torch.nn.utils.clip_grad_norm_(parameters, most)).item()
