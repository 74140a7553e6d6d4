"""What every benchmark does alike: check its repetitions, and keep its numbers."""

from pathlib import Path
from typing import Any

from moe_rl.config import ConfigError
from moe_rl.runlog import write_json


def check_repeats(repeats: int) -> None:
    """Refuse a benchmark that measures nothing.

    Raises:
        ConfigError: fewer than one repetition.
    """
    if repeats < 1:
        raise ConfigError(f"repeats={repeats}: must be at least 1")


def write_result(result: dict[str, Any], out: Path | None) -> None:
    """Write the numbers as JSON and say where; nowhere if `out` is None."""
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, result)
    print(f"written: {out}")
