"""What our engine adds to vLLM's worker; vLLM imports it by name in the worker's process."""

from typing import Any


class RepackExperts:
    """A base class of vLLM's worker on a CPU (`worker_extension_cls`): a reload that repacks."""

    model_runner: Any
    reload_weights: Any

    def reload_and_repack(self) -> None:
        """Load the weights from the engine's folder, the experts' included."""
        forget_packed_experts(self.model_runner.model)
        self.reload_weights()


def forget_packed_experts(model: Any) -> None:
    """Make the next load of weights pack the experts for the CPU kernels again.

    vLLM 0.28 to 0.32 pack an expert layer when they build its kernel, so at the first load alone;
    later loads leave the packed ones as they are. Without a kernel they build, and pack, again.
    """
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None
