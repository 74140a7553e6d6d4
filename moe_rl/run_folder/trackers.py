"""Trackers: show the lines of a run's logs in TensorBoard, Weights & Biases or trackio.

A line of steps.jsonl keeps its metric names, at x = rollout step. A line of updates.jsonl has them
behind `update/`, at x = step * updates_per_rollout + update. A list is one number per entry:

    reward                        reward
    routing/churn_per_layer [L]   routing/churn/layer_0, routing/churn/layer_1, ...
    loss, of an update            update/loss

The run folder stays the truth: a tracker changes no bit of a run and is no part of its config.
NaN and inf are passed on; each package shows them in its own way.
"""

import contextlib
import functools
import json
import os
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moe_rl.metrics.names import Dialect, rename
from moe_rl.runtime.extras import import_extra

TrackerName = Literal["tensorboard", "wandb", "trackio"]
PROJECT = "moe-rl"


class TrackerWarning(UserWarning):
    """A tracker failed and is dropped; the run continues."""


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """What a tracker is told when a run starts."""

    name: str
    config: dict[str, Any]
    """Nested, ready for JSON."""
    folder: Path
    """The run folder, which exists."""
    updates_per_rollout: int
    resumed: bool
    """False: the run starts anew, whatever an earlier attempt left in the folder."""

    def tracked_id(self, tracker: str) -> str:
        """Id of this run at a tracker, kept in the run folder so that a resumed run finds it."""
        file = self.folder / tracker / "id"
        if not (self.resumed and file.is_file()):
            file.parent.mkdir(exist_ok=True)
            file.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
        return file.read_text(encoding="utf-8")


Log = Callable[[str, int, Mapping[str, float]], None]
"""`log(axis, x, values)` shows the numbers of one line; axis is "step" or "update"."""
Finish = Callable[[], None]
Tracker = Callable[[TrackedRun], tuple[Log, Finish]]
"""Begins to track a run, or continues with a resumed one. An exception drops the tracker."""


def make_trackers(names: Sequence[TrackerName], dialect: Dialect | None = None) -> list[Tracker]:
    """The trackers of those names, each once, not started yet.

    Args:
        names: of the packages.
        dialect: whose names of metrics they show, see moe_rl/metrics/names.py; None: ours.

    Raises:
        ConfigError: a package is not installed; names the extra that installs it.
    """
    # wandb reads it when it is imported: crash reports would be sent even offline.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    for name in names:
        import_extra(name, extra=name, option=f"tracker={name!r}")
    found = [_TRACKERS[name] for name in dict.fromkeys(names)]
    return found if dialect is None else [_speaking(tracker, dialect) for tracker in found]


def _speaking(tracker: Tracker, dialect: Dialect) -> Tracker:
    """A tracker that shows metrics under a dialect's names, those of updates too."""

    @functools.wraps(tracker)
    def speaking(run: TrackedRun) -> tuple[Log, Finish]:
        log, finish = tracker(run)

        return lambda axis, x, values: log(axis, x, rename(values, dialect)), finish

    return speaking


class Trackers:
    """Passes the lines of one run to every tracker, and drops a tracker that fails."""

    def __init__(self, trackers: Sequence[Tracker], run: TrackedRun) -> None:
        self._updates_per_rollout = run.updates_per_rollout
        self._active: dict[Tracker, tuple[Log, Finish]] = {}
        for tracker in trackers:
            with self._dropped_on_error(tracker):
                self._active[tracker] = tracker(run)

    def log(self, axis: str, line: Mapping[str, Any]) -> None:
        """Show a line of steps.jsonl ("step") or updates.jsonl ("update")."""
        x, prefix = line["step"], ""
        if axis == "update":
            x, prefix = x * self._updates_per_rollout + line["update"], "update/"
        values = line_numbers(line, prefix)
        for tracker, (log, _) in tuple(self._active.items()):
            with self._dropped_on_error(tracker):
                log(axis, x, values)

    def finish(self) -> None:
        """End all of them. A second call does nothing."""
        for tracker, (_, finish) in tuple(self._active.items()):
            with self._dropped_on_error(tracker):
                finish()
        self._active.clear()

    @contextlib.contextmanager
    def _dropped_on_error(self, tracker: Tracker) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 -- no foreign package may stop a run
            self._active.pop(tracker, None)
            message = (
                f"tracker={tracker.__name__!r}: dropped after {type(error).__name__}: "
                f"{error!s:.300}; the run continues, and its files are complete"
            )
            warnings.warn(TrackerWarning(message), stacklevel=2)


def line_numbers(line: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Every number of a line by its tracked name; text, `step` and `update` are left out."""
    numbers: dict[str, float] = {}
    for key, value in line.items():
        if key in ("step", "update"):
            continue
        if isinstance(value, int | float):
            numbers[prefix + key] = float(value)
        elif isinstance(value, list | tuple):
            stem = prefix + "/".join(key.rsplit("_per_", 1))
            numbers |= {f"{stem}_{i}": float(item) for i, item in enumerate(value)}
    return numbers


def tensorboard(run: TrackedRun) -> tuple[Log, Finish]:
    """Write event files to RUN/tensorboard/steps and RUN/tensorboard/updates."""
    from torch.utils.tensorboard import SummaryWriter

    writers: dict[str, Any] = {}

    def log(axis: str, x: int, values: Mapping[str, float]) -> None:
        if axis not in writers:
            # Hides what earlier attempts showed from here on. It purges all tags of a folder at one
            # x, so each axis has its own folder.
            folder = str(run.folder / "tensorboard" / f"{axis}s")
            writers[axis] = SummaryWriter(folder, purge_step=x)
            writers[axis].add_text("config", f"```\n{json.dumps(run.config, indent=2)}\n```", x)
        for name, value in values.items():
            writers[axis].add_scalar(name, value, x)
        writers[axis].flush()  # a process that is killed leaves no gap

    def finish() -> None:
        for writer in writers.values():
            writer.close()

    return log, finish


def wandb(run: TrackedRun) -> tuple[Log, Finish]:
    """Write Weights & Biases' offline files to RUN/wandb, unless WANDB_MODE says otherwise."""
    import wandb

    mode = os.environ.get("WANDB_MODE", "offline")
    tracked = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=run.name,
        id=run.tracked_id("wandb"),
        resume=None if mode == "offline" else "allow",  # offline parts are joined by their id
        dir=str(run.folder),
        config=run.config,
        mode=mode,
        reinit="create_new",  # a run that the caller has open stays open
        settings=wandb.Settings(console="off", silent=True),
    )
    defined: set[str] = set()

    def log(axis: str, x: int, values: Mapping[str, float]) -> None:
        place = "rollout_step" if axis == "step" else "update_step"
        # By name: a pattern for the steps would match `update/*` too.
        for name in values.keys() - defined:
            tracked.define_metric(name, step_metric=place)
        defined.update(values)
        tracked.log({place: x, **values})

    return log, tracked.finish


def trackio(run: TrackedRun) -> tuple[Log, Finish]:
    """Write to trackio's local database, in TRACKIO_DIR or where trackio puts it."""
    import trackio

    tracked = trackio.init(
        project=os.environ.get("TRACKIO_PROJECT", PROJECT),
        name=f"{run.name}-{run.tracked_id('trackio')}",
        config=run.config,
        resume="allow",
        embed=False,
        auto_log_gpu=False,
        auto_log_cpu=False,
    )
    return lambda _, x, values: tracked.log(dict(values), step=x), tracked.finish


_TRACKERS: dict[str, Tracker] = {"tensorboard": tensorboard, "wandb": wandb, "trackio": trackio}
