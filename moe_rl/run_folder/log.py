"""The run folder: config.json, steps.jsonl, updates.jsonl, and summary.json written last.

A run is complete when its summary.json is there. Lines are written whole and flushed, so a killed
run loses at most the line being written. Everything the report shows is drawn from these files.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from filelock import BaseFileLock, FileLock, Timeout

from moe_rl.config import SCHEMA, ConfigError, RunConfig, flat_settings, load_config
from moe_rl.run_folder.sealing import flush
from moe_rl.run_folder.trackers import TrackedRun, Tracker, Trackers

LOCK = "lock"
OUTPUT = "output.txt"
"""What a run of a study prints."""
STEPS, UPDATES = "steps.jsonl", "updates.jsonl"
_PARTIAL = ".partial"


def run_name(config: RunConfig) -> str:
    """Name of a run that the user gave none: SETTING-ARM-seedN, with its kind of replay."""
    replay = "" if config.routing_replay == "disabled" else f"-{config.routing_replay}"
    return f"{config.setting}-{config.named().arm}{replay}-seed{config.seed}"


def jsonable(value: Any) -> Any:
    """`value` with NaN and inf as the strings NaN, Infinity, -Infinity, which JSON lacks."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, Mapping):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    return value


def write_json(path: Path, value: Any) -> None:
    """Write `value` so that `path` is either the old file or the whole new one."""
    temporary = path.with_name(path.name + _PARTIAL)
    temporary.write_text(json.dumps(jsonable(value), indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def write_config(path: Path, config: RunConfig) -> None:
    """Write a config as `load_config` reads it."""
    write_json(path, {"schema": SCHEMA, "config": config.to_dict()})


def is_complete(folder: Path) -> bool:
    """Whether the run in `folder` has ended: its summary is there, whole, and says so."""
    try:
        return json.loads((folder / "summary.json").read_text("utf-8"))["complete"] is True
    except (OSError, ValueError, LookupError, TypeError):  # absent, torn, or no summary
        return False


def check_can_be_made(folder: Path, option: str) -> None:
    """Refuse a folder that is a file, lies under a file, or cannot be written.

    Raises:
        ConfigError: names the option, and the part of the path that is in the way.
    """
    path = next(p for p in (folder, *folder.absolute().parents) if os.path.lexists(p))
    name, where = f"{option}={str(folder)!r}", "" if path == folder else f" ({path})"
    if not path.is_dir():
        raise ConfigError(f"{name}: a file is in the way{where}; give a folder")
    if not os.access(path, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{name}: nothing can be written there{where}, Permission denied; give another folder"
        )


def check_run_folder(folder: Path, config: RunConfig) -> None:
    """Refuse a folder that is in use for anything but this very run.

    Raises:
        ConfigError: the folder holds a run of another config (the first difference is named), or
            files that are no run at all.
    """
    check_can_be_made(folder, "out")
    if (folder / "config.json").is_file():
        theirs = flat_settings(load_config(str(folder / "config.json")).to_dict())
        for key, value in flat_settings(config.to_dict()).items():
            if theirs[key] != value:
                way_out = "give another folder"
                if key.endswith("_sha256") and value is not None:
                    way_out += ", or write the new value into its config.json to go on with the "
                    way_out += "changed file"
                raise ConfigError(
                    f"out={str(folder)!r}: holds a run with {key}={theirs[key]!r}, "
                    f"this one has {value!r}; {way_out}"
                )
        return
    # What a run that stopped before its config was whole can have left.
    ours = (LOCK, OUTPUT, STEPS, UPDATES)
    names = [file.name for file in folder.iterdir()] if folder.exists() else []
    if any(name not in ours and not name.endswith(_PARTIAL) for name in names):
        raise ConfigError(f"out={str(folder)!r}: holds files that are no run; give a new folder")


def lock_run_folder(folder: Path) -> BaseFileLock:
    """Make a run folder and hold it for this process, at most until the process ends.

    Raises:
        ConfigError: another process writes this run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise ConfigError(
            f"out={str(folder)!r}: another process is writing this run; wait for it, or give "
            "another folder"
        ) from error
    return lock


class RunLog:
    """Writes one run folder.

    Opening it removes the lines of an earlier attempt behind `done_steps` rollout steps. Each line
    goes to `trackers` too, which are not started yet; one that fails is dropped with a warning.

    Raises:
        ConfigError: a log lacks lines of these steps.
    """

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        trackers: Sequence[Tracker] = (),
        *,
        done_steps: int = 0,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        # A run is complete by its summary: one that is started or resumed has none.
        (folder / "summary.json").unlink(missing_ok=True)
        write_config(folder / "config.json", config)
        kept = {STEPS: done_steps, UPDATES: done_steps * config.updates_per_rollout}
        self._steps, self._updates = (_open_behind(folder / n, kept[n]) for n in kept)
        tracked = TrackedRun(
            name=run_name(config),
            config=config.to_dict(),
            folder=folder,
            updates_per_rollout=config.updates_per_rollout,
            resumed=done_steps > 0,
        )
        self._trackers = Trackers(trackers, tracked)

    def step(self, values: Mapping[str, Any]) -> None:
        """Append one line to steps.jsonl."""
        _append(self._steps, values)
        self._trackers.log("step", values)

    def update(self, values: Mapping[str, Any]) -> None:
        """Append one line to updates.jsonl."""
        _append(self._updates, values)
        self._trackers.log("update", values)

    def flush(self) -> None:
        """Have all lines on the disk: a checkpoint must not survive the lines before it."""
        flush(self.folder / STEPS)
        flush(self.folder / UPDATES)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json, which marks the run as complete."""
        write_json(self.folder / "summary.json", {"schema": SCHEMA, "complete": True, **summary})
        self.close()

    def close(self) -> None:
        """Close the files; the run stays incomplete unless `finish` was called."""
        self._steps.close()
        self._updates.close()
        self._trackers.finish()


class NoLog:
    """Writes nothing: the log of a process that another one logs for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def step(self, *values: Any) -> None:
        """Write nothing."""

    update = flush = finish = close = step


def _open_behind(log: Path, count: int) -> IO[bytes]:
    """Open a log to write behind its first `count` lines; the others are cut off."""
    content = log.read_bytes() if log.is_file() else b""
    # Without a torn last line.
    lines = content[: content.rfind(b"\n") + 1].splitlines(keepends=True)[:count]
    if len(lines) < count:
        raise ConfigError(
            f"{log}: {len(lines)} lines, the checkpoint has {count}: lines are lost; give another "
            "folder to run anew"
        )
    file = log.open("ab")
    file.truncate(sum(map(len, lines)))
    return file


def _append(log: IO[bytes], values: Mapping[str, Any]) -> None:
    """Write a line whole."""
    log.write((json.dumps(jsonable(values)) + "\n").encode())
    log.flush()
