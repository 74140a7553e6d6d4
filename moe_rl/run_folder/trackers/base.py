"""What a tracker is, and how a line of a run's logs becomes numbers with names.

A line of steps.jsonl keeps its names, at x = rollout step. A line of updates.jsonl has them behind
`update/`, at x = step * updates_per_rollout + update, which is the number of its line.

    reward                        reward
    routing/churn_per_layer [L]   routing/churn/layer_0, routing/churn/layer_1, ...
    loss, of an update            update/loss
"""

import json
import math
import re
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

TrackerName = Literal["tensorboard", "wandb", "trackio"]
Axis = Literal["step", "update"]

NONFINITE = "nonfinite"
"""Name of the number of values in a line that are NaN or infinite; there only if any is."""
_PREFIX: dict[Axis, str] = {"step": "", "update": "update/"}
_ADDRESS = ("step", "update")


class TrackerWarning(UserWarning):
    """A tracker failed and is dropped; the run goes on."""


@dataclass(frozen=True, kw_only=True)
class Resume:
    """Where a run goes on, by axis. Lines between the two are written a second time, the same."""

    first: Mapping[Axis, int]
    """x of the first line that is written now."""
    shown: Mapping[Axis, int]
    """x of the first line that no earlier attempt has written."""


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """What a tracker is told when a run starts."""

    name: str
    config: Mapping[str, Any]
    """Nested, ready for JSON."""
    folder: Path
    """The run folder, which exists."""
    resume: Resume | None
    """None: the run starts anew, whatever the folder holds of earlier attempts."""


class Tracker(Protocol):
    """Shows one run. Every method may raise OSError, ValueError, RuntimeError or `errors`."""

    name: str
    errors: tuple[type[Exception], ...]
    """What else the backend raises when it fails."""

    def start(self, run: TrackedRun) -> None:
        """Begin, or go on with, a run. Called once, before anything is logged."""

    def log(self, axis: Axis, x: int, values: Mapping[str, float]) -> None:
        """Show the numbers of one line; they may be NaN or infinite."""

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """End; None: the run was interrupted and may go on later. Nothing is called afterwards."""


def numbers(axis: Axis, line: Mapping[str, Any]) -> dict[str, float]:
    """Every number of a line by the name that trackers show it under, and `nonfinite`.

    Text is left out; `step` and `update` are where the line stands, not what it says.
    """
    prefix = _PREFIX[axis]
    found = {
        prefix + name: number
        for key, value in line.items()
        if key not in _ADDRESS
        for name, number in _named(key, value)
    }
    bad = sum(not math.isfinite(number) for number in found.values())
    return found | ({prefix + NONFINITE: float(bad)} if bad else {})


def _named(key: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, int | float):
        yield key, float(value)
    elif isinstance(value, list | tuple):
        listed = re.fullmatch(r"(.+)_per_(\w+)", key)
        stem = f"{listed[1]}/{listed[2]}_" if listed else f"{key}/"
        for i, item in enumerate(value):
            yield from _named(f"{stem}{i}", item)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a backend that cannot delete has a run: under which id, and how much of it."""

    id: str
    goes_on: bool
    """Whether an earlier attempt began under this id."""
    shown: Mapping[Axis, int]
    """x of each axis below which all points are there: lines made again are the same, leave them
    out."""


def take_place(run: TrackedRun, tracker: str) -> Place:
    """Find or make a run's place at a tracker, and keep it in the run folder.

    A run that starts anew gets a new id.
    """
    file = place_file(run.folder, tracker)
    if run.resume is None or not file.is_file():
        place = Place(id=uuid.uuid4().hex[:8], goes_on=False, shown={"step": 0, "update": 0})
    else:
        before = json.loads(file.read_text(encoding="utf-8"))
        # An attempt that got less far than the one before has cut the logs shorter.
        further = {axis: max(x, before["shown"][axis]) for axis, x in run.resume.shown.items()}
        place = Place(id=before["id"], goes_on=True, shown=further)
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"id": place.id, "shown": place.shown}) + "\n", encoding="utf-8")
    return place


def place_file(folder: Path, tracker: str) -> Path:
    """Where a run folder keeps its place at a tracker."""
    return folder / tracker / "place.json"
