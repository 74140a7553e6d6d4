"""What runs where, and why: versions, devices, and every backend choice with its reason."""

import importlib.metadata
import os
import platform

import torch

from moe_rl import __version__
from moe_rl.cpu import choose_layers
from moe_rl.experts import choose_experts, megablocks_package
from moe_rl.kernels import choose_backend
from moe_rl.kernels.product import product_reason
from moe_rl.kernels.routing_stats import choose_routing_backend
from moe_rl.policy.policy import resolve_device
from moe_rl.rollout.engine import choose_engine

_PACKAGES = ("torch", "transformers", "triton", "numpy", "pandas", "matplotlib")
_OPTIONAL = ("trl", "liger-kernel", "vllm", "kernels", "tensorboard", "wandb", "trackio")


def describe() -> str:
    """The report of `moe-rl doctor`, one aligned line a fact."""
    device = resolve_device("auto")
    rows = [
        ("moe-rl", __version__),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        *((name, _version(name)) for name in _PACKAGES),
        *((f"{name} (optional)", _version(name)) for name in _OPTIONAL),
        ("cpu", f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"),
        ("cuda", _cuda()),
        ("device auto", f"{device.type}: {_device_reason()}"),
        ("experts auto", ": ".join(choose_experts(device, "auto"))),
        ("layers, fp32", ": ".join(choose_layers(device, torch.float32))),
        ("megablocks", megablocks_package.describe(device)),
        *_log_probs(device),
        ("routing statistics", ": ".join(choose_routing_backend("auto", device))),
        ("rollout engine", ": ".join(choose_engine("cached"))),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _log_probs(device: torch.device) -> list[tuple[str, str]]:
    """The choice for the small study (1024 tokens, 13 words) and for a real vocabulary."""
    return [
        (
            f"log-probs, V = {vocab}",
            ": ".join(choose_backend("auto", device=device, num_tokens=1024, vocab=vocab)),
        )
        for vocab in (13, 151936)
    ] + [("log-probs, CPU products", product_reason())]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cuda() -> str:
    if not torch.cuda.is_available():
        return "not available"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{', '.join(names)}, CUDA {torch.version.cuda}"


def _device_reason() -> str:
    return "CUDA is available" if torch.cuda.is_available() else "there is no CUDA device"
