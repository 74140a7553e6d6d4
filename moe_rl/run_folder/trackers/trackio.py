"""trackio: its local database, in TRACKIO_DIR or where trackio puts it.

    trackio show --project moe-rl

Metrics of updates and of steps share one `step` column, each with its own x. NaN and infinities are
kept. A backend that cannot delete: a run that goes on leaves out the lines which an earlier attempt
has logged, and which are the same. trackio writes from a thread of its own and reports what fails
there itself.
"""

import os
import sqlite3
from collections.abc import Mapping
from typing import Any

from moe_rl.run_folder.trackers.base import Axis, TrackedRun, take_place
from moe_rl.runtime.extras import import_extra

PROJECT = "moe-rl"


class TrackioTracker:
    """Logs to a trackio run of its own, named after the run and the id that tells it apart.

    Raises:
        ConfigError: the package is not installed.
    """

    name = "trackio"
    errors: tuple[type[Exception], ...] = (sqlite3.Error,)

    def __init__(self) -> None:
        self._trackio = import_extra("trackio", extra="trackio", option=f"tracker={self.name!r}")
        self._run: Any = None
        self._shown: Mapping[Axis, int] = {}

    def start(self, run: TrackedRun) -> None:
        """Begin the run, or go on with it under its name."""
        place = take_place(run, self.name)
        self._shown = place.shown
        self._run = self._trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=f"{run.name}-{place.id}",
            config=dict(run.config),
            resume="allow" if place.goes_on else "never",
            embed=False,
            auto_log_gpu=False,  # of a run that shares the machine they say little
            auto_log_cpu=False,
        )

    def log(self, axis: Axis, x: int, values: Mapping[str, float]) -> None:
        """Log one row."""
        if x >= self._shown[axis]:
            self._run.log(dict(values), step=x)

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """Wait until the rows are in the database."""
        self._run.finish()
