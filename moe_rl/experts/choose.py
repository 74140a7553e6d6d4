"""Which experts backend runs: the one decision point, with its reason."""

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_rl.experts import megablocks_package
from moe_rl.experts.cpu_sorted import NAME as CPU_SORTED
from moe_rl.experts.megablocks import GROUPED, SPARSE
from moe_rl.runtime.choice import Choice

# torch never frees a tensor that numpy has looked into.
_NOT_SHARDED = "numpy multiplies by the weights, and FSDP2 could not free them"


def valid_experts() -> list[str]:
    """Names `choose_experts` takes: `auto`, `eager`, and all that transformers has registered."""
    return ["auto", "eager", *sorted(ALL_EXPERTS_FUNCTIONS.valid_keys())]


def choose_experts(
    device: torch.device | str, requested: str = "auto", *, sharded: bool = False
) -> Choice:
    """The experts backend for a device.

    Args:
        device: where the experts run.
        requested: `auto`, or one of `valid_experts()`, which is then taken as it is.
        sharded: whether FSDP2 will gather the weights for each pass and free them again.

    Raises:
        ValueError: an unknown name, the message lists the valid ones; or a backend that cannot run
            here, the message says why.
    """
    names = valid_experts()
    if requested not in names:
        raise ValueError(
            f"experts backend {requested!r} is unknown: choose one of {', '.join(names)}"
        )
    why_not = megablocks_package.problem(device)
    if requested in (GROUPED, SPARSE) and why_not is not None:
        raise ValueError(f"experts backend {requested!r} cannot run here: {why_not}")
    if requested == CPU_SORTED and sharded:
        raise ValueError(f"experts backend {requested!r} cannot run here: {_NOT_SHARDED}")
    if requested != "auto":
        return Choice(requested, "asked for by name")
    kind = torch.device(device).type
    if kind == "cpu" and sharded:
        return Choice("grouped_mm", f"transformers' own; not {CPU_SORTED}: {_NOT_SHARDED}")
    if kind == "cpu":
        return Choice(
            CPU_SORTED,
            "on a CPU, tokens sorted once, one autograd node a layer, and products by numpy take "
            "the least time of the backends measured",
        )
    if why_not is None:
        return Choice(
            GROUPED,
            f"installed, with the {megablocks_package.extension()}; dropless gather and scatter "
            "kernels around one grouped product a matrix",
        )
    return Choice(
        "grouped_mm",
        f"transformers' own default on {kind}, one grouped product a matrix; not {GROUPED}: "
        f"{why_not}",
    )
