"""What TRL has logged, with our mixin or without: `trainer_state.json` of a checkpoint or a run.

A log holds means over updates and no tokens, so there are no ratios' tails and no scatter; what it
has by our names, or by TRL's for the same quantities, is judged by its last steps.
"""

import json
import math
from pathlib import Path
from typing import Any

from moe_rl.config import ConfigError
from moe_rl.metrics.names import ours_of
from moe_rl.recorded.inspection import Inspection

STATE = "trainer_state.json"
LAST = 10
"""Log lines whose mean stands for where the run is now."""
_OURS = (
    *("routing/", "ratio/", "branch/", "rollout_ratio/"),
    *("mismatch/", "replay/", "clip_ratio/", "kl_k3"),
)
_BY_TRL = ours_of("trl")


def find_state(path: Path) -> Path | None:
    """The newest trainer state in TRL's output folder or in one of its checkpoints."""
    found = [path / STATE, *path.glob(f"checkpoint-*/{STATE}")]
    existing = [file for file in found if file.is_file()]
    return max(existing, key=lambda file: file.stat().st_mtime, default=None)


def inspect_log(state: Path) -> Inspection:
    """The metrics of a log, by our names.

    Raises:
        ConfigError: no trainer state, or one without metrics that mean something here.
    """
    try:
        logged = json.loads(state.read_text())["log_history"]
        lines: list[dict[str, Any]] = [dict(line) for line in logged]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{state}: no log of TRL ({error!r}); give its output folder") from error
    history: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for name, value in line.items():
            ours = _BY_TRL.get(name, name)
            known = ours in _BY_TRL.values() or ours.startswith(_OURS)
            if known and isinstance(value, int | float):
                history.setdefault(ours, []).append((int(line.get("step") or 0), float(value)))
    if not history:
        raise ConfigError(f"{state}: its log has no metric that is known here")
    last = {
        name: [value for _, value in points[-LAST:] if math.isfinite(value)]
        for name, points in history.items()
    }
    return Inspection(
        source="TRL",
        sequences=0,
        tokens=0,
        holds=[f"{len(lines)} log lines"],
        notes=[f"means over the last {LAST} log lines; a log holds no tokens"],
        metrics={name: sum(values) / len(values) for name, values in last.items() if values},
        history=history,
    )
