"""The run folder: config.json, steps.jsonl, updates.jsonl, and summary.json written last.

A run is complete when its summary.json is there. Lines are written whole and flushed, so a killed
run loses at most the line being written. Everything the report shows is drawn from these files.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypedDict

from moe_rl.config import SCHEMA, ConfigError, RunConfig, load_config
from moe_rl.run_folder.trackers import TrackedRun, Tracker, Trackers
from moe_rl.runtime.json_text import parse_json

LOCK = "lock"
OUTPUT = "output.txt"
"""What a run of a study prints."""
_LOGS = ("steps.jsonl", "updates.jsonl")
_PARTIAL = ".partial"


def run_name(config: RunConfig) -> str:
    """What a run is called where nobody names it: SETTING-ARM-seedN, with its kind of replay."""
    replay = "" if config.routing_replay == "disabled" else f"-{config.routing_replay}"
    return f"{config.setting}-{config.named().arm}{replay}-seed{config.seed}"


def jsonable(value: Any) -> Any:
    """`value` with non-finite floats as the strings NaN, Infinity, -Infinity: JSON has none."""
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
        summary = parse_json((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(summary, dict) and summary.get("complete") is True


def check_can_be_made(folder: Path, option: str) -> None:
    """Refuse a folder that is there as something else, or that cannot be made or written.

    Raises:
        ConfigError: names the option, and the part of the path that is in the way.
    """
    name = f"{option}={str(folder)!r}"
    for path in (folder, *folder.absolute().parents):
        if not os.path.lexists(path):
            continue
        where = "" if path == folder else f" ({path})"
        if not path.is_dir():
            raise ConfigError(f"{name}: a file is in the way{where}; give a folder")
        try:
            longest = os.pathconf(path, "PC_NAME_MAX")
            # Tried out, as a system has more reasons to refuse than permissions tell.
            os.rmdir(tempfile.mkdtemp(dir=path, suffix=_PARTIAL))
        except OSError as error:
            raise ConfigError(
                f"{name}: nothing can be written there{where}, {error.strerror}; give another "
                "folder"
            ) from error
        for part in folder.parts:
            if len(os.fsencode(part)) > longest:
                raise ConfigError(
                    f"{name:.80}...: a name of {len(os.fsencode(part))} bytes, at most {longest} "
                    "are possible there; give a shorter one"
                )
        return


def check_run_folder(folder: Path, config: RunConfig) -> None:
    """Refuse a folder that is in use for anything but this very run.

    Raises:
        ConfigError: the folder holds a run of another config (the first difference is named), or
            files that are no run at all.
    """
    check_can_be_made(folder, "out")
    if not folder.exists():
        return
    if not (folder / "config.json").is_file():
        if any(not _is_ours(file.name) for file in folder.iterdir()):
            raise ConfigError(
                f"out={str(folder)!r}: holds files that are no run; give a new folder"
            )
        return
    ours, theirs = (
        _flat(config.to_dict()),
        _flat(load_config(str(folder / "config.json")).to_dict()),
    )
    for key, value in ours.items():
        if theirs[key] != value:
            raise ConfigError(
                f"out={str(folder)!r}: holds a run with {key}={theirs[key]!r}, "
                f"this one has {value!r}; give another folder"
            )


def _is_ours(name: str) -> bool:
    """Whether a run that stopped before its config was whole can have left such a file."""
    return name in (LOCK, OUTPUT, *_LOGS) or name.endswith(_PARTIAL)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


class Mark(TypedDict):
    """What a log held at a checkpoint."""

    size: int
    """Bytes."""
    sha256: str


Marks = Mapping[str, Mark]
"""By name of the log."""


class RunLog:
    """Writes one run folder.

    Opening it starts the run anew: lines of an interrupted attempt at the same run are replaced.
    With `marks`, from a checkpoint, it goes on behind the lines that were there then. Each line
    goes to `trackers` too; one that fails is dropped with a warning.

    Raises:
        ConfigError: the folder holds something else, another process writes the run, or a log is
            not what it was at the checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        marks: Marks | None = None,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        check_run_folder(folder, config)
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._lock = _lock(folder)
        # Both are looked at before anything is cut or written.
        held = {} if marks is None else {n: _held(folder / n, marks[n]) for n in _LOGS}
        # A run is complete by its summary: one that starts anew has none.
        (folder / "summary.json").unlink(missing_ok=True)
        write_config(folder / "config.json", config)
        self._steps, self._updates = (_Log(folder / name, held.get(name, b"")) for name in _LOGS)
        tracked = TrackedRun(
            name=run_name(config),
            config=config.to_dict(),
            folder=folder,
            updates_per_rollout=config.updates_per_rollout,
            resumed=marks is not None,
        )
        self._trackers = Trackers(trackers, tracked)

    def step(self, values: Mapping[str, Any]) -> None:
        """Append one line to steps.jsonl."""
        self._steps.append(values)
        self._trackers.log_step(values)

    def update(self, values: Mapping[str, Any]) -> None:
        """Append one line to updates.jsonl."""
        self._updates.append(values)
        self._trackers.log_update(values)

    def marks(self) -> Marks:
        """What each log holds, all of it on the disk."""
        return {log.path.name: log.mark() for log in (self._steps, self._updates)}

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json, which marks the run as complete."""
        self._close_files()
        write_json(self.folder / "summary.json", {"schema": SCHEMA, "complete": True, **summary})
        self._trackers.finish()

    def close(self) -> None:
        """Close the files; the run stays incomplete unless `finish` was called."""
        self._close_files()
        self._trackers.finish()

    def _close_files(self) -> None:
        self._steps.close()
        self._updates.close()
        self._lock.close()


class NoLog:
    """Writes nothing: the log of a process that another one logs for.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def step(self, values: Mapping[str, Any]) -> None:
        """Nothing."""

    def update(self, values: Mapping[str, Any]) -> None:
        """Nothing."""

    def marks(self) -> Marks:
        """No file."""
        return {}

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def _lock(folder: Path) -> IO[str]:
    """Hold the folder for this process; the system lets go when the process ends, however it ends.

    Raises:
        ConfigError: another process writes this run.
    """
    file = (folder / LOCK).open("w", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise _in_use(folder) from error
    return file


def check_unlocked(folder: Path) -> None:
    """Refuse a folder that another process holds, without holding it.

    Not part of `check_run_folder`: processes that train together check after one of them has begun.

    Raises:
        ConfigError: another process writes this run.
    """
    with contextlib.suppress(FileNotFoundError), (folder / LOCK).open(encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _in_use(folder) from error


def _in_use(folder: Path) -> ConfigError:
    return ConfigError(
        f"out={str(folder)!r}: another process is writing this run; wait for it, or give another "
        "folder"
    )


def logged_updates(folder: Path) -> int:
    """How many updates a run folder has lines of."""
    return _content(folder / "updates.jsonl").count(b"\n")


def _content(log: Path) -> bytes:
    return log.read_bytes() if log.is_file() else b""


def _held(path: Path, mark: Mark) -> bytes:
    """What a log held at a checkpoint.

    Raises:
        ConfigError: that is not there any more.
    """
    size, found = mark["size"], _content(path)
    if len(found) < size:
        raise ConfigError(
            f"{path}: {len(found)} bytes, {size} at the checkpoint: lines are lost; give another "
            "folder to run anew"
        )
    if hashlib.sha256(found[:size]).hexdigest() != mark["sha256"]:
        raise ConfigError(
            f"{path}: its first {size} bytes are not those of the checkpoint: lines were changed; "
            "bring them back, or give another folder to run anew"
        )
    return found[:size]


class _Log:
    """A file of JSON lines, cut to what it held before."""

    def __init__(self, path: Path, held: bytes) -> None:
        self.path = path
        self._hash = hashlib.sha256(held)
        if held:
            os.truncate(path, len(held))
        self._file = path.open("ab" if held else "wb")

    def append(self, values: Mapping[str, Any]) -> None:
        """Write a line whole."""
        line = (json.dumps(jsonable(values)) + "\n").encode()
        self._file.write(line)
        self._file.flush()
        self._hash.update(line)

    def mark(self) -> Mark:
        """What the file holds, all of it on the disk."""
        os.fsync(self._file.fileno())
        return {"size": self._file.tell(), "sha256": self._hash.hexdigest()}

    def close(self) -> None:
        """Close the file."""
        self._file.close()
