"""One line to every tracker. A tracker that fails is dropped with one warning; the run goes on."""

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moe_rl.run_folder.trackers.base import (
    Axis,
    TrackedRun,
    Tracker,
    TrackerWarning,
    numbers,
    place_file,
)

FAILURES: tuple[type[Exception], ...] = (OSError, ValueError, RuntimeError)
"""What is caught of any tracker, beside its own `errors`: a full disk, a value that the backend
refuses, a backend that has died. Anything else is a bug, ours or theirs, and ends the run."""


class FanOut:
    """The trackers of one run.

    Args:
        trackers: not started yet.
        run: what they are told.
        updates_per_rollout: m, which places the lines of updates.
    """

    def __init__(
        self, trackers: Sequence[Tracker], run: TrackedRun, updates_per_rollout: int
    ) -> None:
        self._trackers = list(trackers)
        self._run, self._updates = run, updates_per_rollout
        self._each(lambda tracker: tracker.start(run))

    def step(self, line: Mapping[str, Any]) -> None:
        """Show a line of steps.jsonl."""
        if self._trackers:
            self._log("step", line["step"], line)

    def update(self, line: Mapping[str, Any]) -> None:
        """Show a line of updates.jsonl."""
        if self._trackers:
            self._log("update", line["step"] * self._updates + line["update"], line)

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """End all of them; None: the run was interrupted. A second call does nothing."""
        self._each(lambda tracker: tracker.finish(summary))
        self._trackers.clear()

    def _log(self, axis: Axis, x: int, line: Mapping[str, Any]) -> None:
        values = numbers(axis, line)
        self._each(lambda tracker: tracker.log(axis, x, values))

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for tracker in tuple(self._trackers):
            try:
                act(tracker)
            except FAILURES + tracker.errors as error:
                self._drop(tracker, error)

    def _drop(self, tracker: Tracker, error: Exception) -> None:
        self._trackers.remove(tracker)
        # It lacks lines from here on: a run that goes on later takes a new place.
        with contextlib.suppress(OSError):
            place_file(self._run.folder, tracker.name).unlink(missing_ok=True)
        said = str(error).strip().splitlines()
        what = f"{type(error).__name__}: {said[0]}" if said else type(error).__name__
        warnings.warn(
            TrackerWarning(
                f"tracker {tracker.name} failed ({what:.300}); the run goes on without it, its "
                "files are complete"
            ),
            stacklevel=2,
        )
