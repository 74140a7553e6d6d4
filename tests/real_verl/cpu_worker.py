"""verl's part of vLLM's worker, with a reload that packs weights for a CPU's kernels again."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension
from vllm.model_executor.model_loader import utils

from moe_rl.rollout.vllm_worker import forget_packed_experts


class CpuWorker(vLLMColocateWorkerExtension):  # type: ignore[misc]
    """verl loads into the parameters that vLLM has packed, which a CPU's have no loader for."""

    def update_weights_from_ipc(self, *given: Any, **named: Any) -> Any:
        process = utils.process_weights_after_loading
        utils.process_weights_after_loading = lambda *given: None  # `reload_weights` has done so
        try:
            return super().update_weights_from_ipc(*given, **named)
        finally:
            utils.process_weights_after_loading = process

    def _update_weights(
        self, weights: Iterable[tuple[str, Tensor]], *given: Any, **named: Any
    ) -> None:
        forget_packed_experts(self.model_runner.model)
        self.model_runner.reload_weights(
            weights_iterator=[(name, value.clone()) for name, value in weights]
        )
