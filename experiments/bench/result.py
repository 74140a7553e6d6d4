"""What every benchmark does alike: take turns, name the machine, print tables, keep the numbers."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from moe_rl.config import ConfigError
from moe_rl.run_folder.log import write_json


def check_counts(**counts: int) -> None:
    """Refuse an option that would measure nothing.

    Raises:
        ConfigError: a count below 1.
    """
    for name, count in counts.items():
        if count < 1:
            raise ConfigError(f"{name}={count}: must be at least 1")


def in_turn(names: Iterable[str], number: int) -> list[str]:
    """The contestants of round `number`: each goes first as often as the others."""
    order = list(names)
    first = number % len(order)
    return order[first:] + order[:first]


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as lines of aligned columns, the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def write_result(result: dict[str, Any], out: Path | None) -> None:
    """Write the numbers as JSON and say where; nowhere if `out` is None."""
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, result)
    print(f"written: {out}")
