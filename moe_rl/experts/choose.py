"""Which experts backend runs: the one decision point, with its reason."""

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_rl.experts import megablocks_package
from moe_rl.experts.megablocks import GROUPED, SPARSE
from moe_rl.runtime.choice import Choice


def valid_experts() -> list[str]:
    """Names `choose_experts` takes: `auto`, `eager`, and all that transformers has registered."""
    return ["auto", "eager", *sorted(ALL_EXPERTS_FUNCTIONS.valid_keys())]


def choose_experts(device: torch.device | str, requested: str = "auto") -> Choice:
    """The experts backend for a device.

    Args:
        device: where the experts run.
        requested: `auto`, or one of `valid_experts()`, which is then taken as it is.

    Raises:
        ValueError: an unknown name, the message lists the valid ones; or a backend that cannot run
            here, the message says why.
    """
    names = valid_experts()
    why_not = megablocks_package.problem(device)
    if requested not in names:
        problem = f"unknown; choose one of {', '.join(names)}"
    elif requested in (GROUPED, SPARSE) and why_not is not None:
        problem = f"cannot run here: {why_not}"
    elif requested != "auto":
        return Choice(requested, "asked for by name")
    else:
        kind = torch.device(device).type
        if kind == "cuda" and why_not is None:
            return Choice(
                GROUPED,
                f"installed, with the {megablocks_package.extension()}; dropless gather and "
                "scatter kernels around one grouped product a matrix",
            )
        not_taken = "" if kind == "cpu" else f"; not {GROUPED}: {why_not}"
        return Choice("grouped_mm", f"transformers' own, one grouped product a matrix{not_taken}")
    raise ValueError(f"experts_implementation={requested!r}: {problem}")
