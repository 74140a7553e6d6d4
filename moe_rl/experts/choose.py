"""Which experts backend runs: the one decision point, with its reason."""

from dataclasses import dataclass

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_rl.experts import megablocks_package
from moe_rl.experts.cpu_sorted import NAME as CPU_SORTED
from moe_rl.experts.megablocks import GROUPED, SPARSE


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A backend's name, as `experts_implementation` takes it, and why it was taken."""

    name: str
    reason: str


def valid_experts() -> list[str]:
    """Names `choose_experts` takes: `auto`, `eager`, and all that transformers has registered."""
    return ["auto", "eager", *sorted(ALL_EXPERTS_FUNCTIONS.valid_keys())]


def choose_experts(device: torch.device | str, requested: str = "auto") -> Choice:
    """The experts backend for a device.

    Args:
        device: where the experts run.
        requested: `auto`, or one of `valid_experts()`, which is then taken as it is.

    Raises:
        ValueError: an unknown name, the message lists the valid ones; or Megablocks where it
            cannot run, the message says what is missing.
    """
    names = valid_experts()
    if requested not in names:
        raise ValueError(
            f"experts backend {requested!r} is unknown: choose one of {', '.join(names)}"
        )
    why_not = megablocks_package.problem(device)
    if requested in (GROUPED, SPARSE) and why_not is not None:
        raise ValueError(f"experts backend {requested!r} cannot run here: {why_not}")
    if requested != "auto":
        return Choice(name=requested, reason=f"{requested}: asked for by name.")
    kind = torch.device(device).type
    if kind == "cpu":
        return Choice(
            name=CPU_SORTED,
            reason=f"{CPU_SORTED}: on a CPU, tokens sorted once and one autograd node a layer take "
            "the least time of the backends measured.",
        )
    if why_not is None:
        return Choice(
            name=GROUPED,
            reason=f"{GROUPED}: installed, with the {megablocks_package.extension()}; dropless "
            "gather and scatter kernels around one grouped product a matrix.",
        )
    return Choice(
        name="grouped_mm",
        reason=f"grouped_mm: transformers' own default on {kind}, one grouped product a matrix; "
        f"not {GROUPED}: {why_not}.",
    )
