"""Trackers: the lines of a run's logs, shown by TensorBoard, Weights & Biases or trackio.

base.py          the protocol, and how a line becomes numbers
fan_out.py       one line to every tracker; a tracker that fails is dropped, never the run
tensorboard.py   event files in the run folder
wandb.py         Weights & Biases, offline unless WANDB_MODE says otherwise
trackio.py       trackio's local database

The run folder stays the truth: a tracker changes no bit of a run and is no part of its config.
"""

from collections.abc import Callable, Sequence

from moe_rl.run_folder.trackers.base import (
    Axis,
    Resume,
    TrackedRun,
    Tracker,
    TrackerName,
    TrackerWarning,
)

__all__ = [
    "Axis",
    "Resume",
    "TrackedRun",
    "Tracker",
    "TrackerName",
    "TrackerWarning",
    "make_trackers",
]


def make_trackers(names: Sequence[TrackerName]) -> list[Tracker]:
    """The trackers of those names, each once, not started yet.

    Raises:
        ConfigError: the package of one is not installed; names the extra that brings it.
    """
    return [_MAKERS[name]() for name in dict.fromkeys(names)]


def _tensorboard() -> Tracker:
    from moe_rl.run_folder.trackers.tensorboard import TensorBoardTracker

    return TensorBoardTracker()


def _wandb() -> Tracker:
    from moe_rl.run_folder.trackers.wandb import WandbTracker

    return WandbTracker()


def _trackio() -> Tracker:
    from moe_rl.run_folder.trackers.trackio import TrackioTracker

    return TrackioTracker()


_MAKERS: dict[TrackerName, Callable[[], Tracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}
