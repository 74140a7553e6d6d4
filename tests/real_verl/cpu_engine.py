"""verl's FSDP engine for a CPU, registered as a plugin for another chip would."""

from typing import Any

import torch.distributed
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

EngineRegistry.register(model_type="language_model", backend="fsdp2", device="cpu")(
    FSDPEngineWithLMHead
)

_init_process_group = torch.distributed.init_process_group


def init_process_group(backend: str | None = None, *given: Any, **named: Any) -> None:
    """verl asks for one backend of the CPU and one of the device, which here is the same."""
    backend = "gloo" if backend == "cpu:gloo,cpu:gloo" else backend
    _init_process_group(backend, *given, **named)


torch.distributed.init_process_group = init_process_group
