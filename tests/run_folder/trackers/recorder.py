"""A tracker that keeps what it is given, to hold the laws of all trackers against."""

from collections.abc import Mapping
from typing import Any

from moe_rl.run_folder.trackers import Axis, TrackedRun


class Recorder:
    name = "recorder"
    errors: tuple[type[Exception], ...] = ()

    def __init__(self) -> None:
        self.run: TrackedRun | None = None
        self.points: dict[Axis, list[tuple[int, dict[str, float]]]] = {"step": [], "update": []}
        self.summaries: list[Mapping[str, Any] | None] = []

    def start(self, run: TrackedRun) -> None:
        self.run = run

    def log(self, axis: Axis, x: int, values: Mapping[str, float]) -> None:
        self.points[axis].append((x, dict(values)))

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        self.summaries.append(summary)
