"""TensorBoard: event files under RUN/tensorboard, one folder an axis.

    tensorboard --logdir runs

A run that goes on has TensorBoard drop what earlier attempts showed from its first line on
(purge_step). That holds for all tags of a folder at one x, so each axis has its own. A run that
starts anew replaces their files. NaN and infinities are kept as they are; numbers are float32.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_rl.run_folder.trackers.base import Axis, TrackedRun
from moe_rl.runtime.extras import import_extra

_FOLDERS: dict[Axis, str] = {"step": "steps", "update": "updates"}
_EVENTS = "events.out.tfevents."


class TensorBoardTracker:
    """Writes event files through PyTorch's writer.

    Raises:
        ConfigError: the package is not installed.
    """

    name = "tensorboard"
    errors: tuple[type[Exception], ...] = ()

    def __init__(self) -> None:
        option = f"tracker={self.name!r}"
        import_extra("tensorboard", extra="tensorboard", option=option)
        self._module = import_extra("torch.utils.tensorboard", extra="tensorboard", option=option)
        self._writers: dict[Axis, Any] = {}

    def start(self, run: TrackedRun) -> None:
        """Open the event files."""
        for axis, name in _FOLDERS.items():
            folder = run.folder / self.name / name
            purge = None
            if run.resume is None:
                _remove_events(folder)
            else:
                purge = run.resume.first[axis]
                _await_later_name(folder)
            self._writers[axis] = self._module.SummaryWriter(str(folder), purge_step=purge)
        self._text("config", run.config)

    def log(self, axis: Axis, x: int, values: Mapping[str, float]) -> None:
        """Append a scalar a number; after each step what was written is on the disk."""
        for name, value in values.items():
            self._writers[axis].add_scalar(name, value, x)
        if axis == "step":
            for writer in self._writers.values():
                writer.flush()

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """Close the files."""
        if summary is not None:
            self._text("summary", summary)
        for writer in self._writers.values():
            writer.close()

    def _text(self, tag: str, values: Mapping[str, Any]) -> None:
        shown = "\n".join(f"    {line}" for line in json.dumps(values, indent=2).splitlines())
        self._writers["step"].add_text(tag, shown)


def _remove_events(folder: Path) -> None:
    for file in folder.glob(f"{_EVENTS}*"):
        file.unlink()


def _await_later_name(folder: Path) -> None:
    """Wait until a new file comes behind those that are there.

    TensorBoard reads them by name, which begins with the second of its making: a purge that is read
    before what it purges would do nothing.
    """
    seconds = [int(file.name[len(_EVENTS) :].split(".")[0]) for file in folder.glob(f"{_EVENTS}*")]
    while seconds and int(time.time()) <= max(seconds):
        time.sleep(0.05)
