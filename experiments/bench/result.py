"""What every benchmark does alike: check its repetitions, name the machine, keep the numbers."""

import contextlib
import platform
from pathlib import Path
from typing import Any

from moe_rl.config import ConfigError
from moe_rl.run_folder.log import write_json


def check_repeats(repeats: int) -> None:
    """Refuse a benchmark that measures nothing.

    Raises:
        ConfigError: fewer than one repetition.
    """
    if repeats < 1:
        raise ConfigError(f"repeats={repeats}: must be at least 1")


def cpu_name() -> str:
    """The processor's name, as far as the system tells."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "cpu"


def write_result(result: dict[str, Any], out: Path | None) -> None:
    """Write the numbers as JSON and say where; nowhere if `out` is None."""
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, result)
    print(f"written: {out}")
