"""Rows of a dataset as they are published: JSONL, parquet and CSV files, the hub, reasoning-gym.

A file is read whole and checked to its last line before anything else happens. Nothing of a dataset
is run: `datasets` reads no loading scripts.
"""

import contextlib
import hashlib
import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moe_rl.runtime.extras import import_extra
from moe_rl.runtime.strict import ConfigError
from moe_rl.tasks.settings import REASONING_GYM

HUB_ID = re.compile(r"(?!.*\.(jsonl?|parquet|csv)$)[\w-][\w.-]*(/[\w.-]+)?")
# reasoning-gym draws row n from seed + n, so that near seeds give the same rows.
_HELD_OUT_SEED = 2**31
_READERS = {".parquet": "parquet", ".csv": "csv"}


class Rows(NamedTuple):
    """What a source holds."""

    where: Sequence[str]
    """The place of each row, for messages: file and line."""
    rows: Sequence[Mapping[str, Any]]
    sha256: str
    """Of a file its bytes', of another source its rows'."""


def read_rows(source: str, *, option: str, config: str | None, split: str) -> Rows:
    """The rows of a file, of a hub dataset's split, or of a dataset of reasoning-gym.

    Args:
        source: path, hub id, or reasoning-gym:NAME.
        option: name of the setting, for messages.
        config: of a hub dataset, or the settings of reasoning-gym as JSON.
        split: of a hub dataset; of reasoning-gym, where `train` and others differ by their seed.

    Raises:
        ConfigError: it cannot be read or has no rows; names the source, and the row where one is
            wrong.
    """
    name, path = f"{option}={source!r}", Path(source)
    if source.startswith(REASONING_GYM):
        gym = make_gym(source, config, split, option=option)
        return _numbered(source, [dict(row) for row in gym])
    if path.exists() or not HUB_ID.fullmatch(source):
        return _read_file(path, name)
    datasets = import_extra("datasets", extra="data", option=name)
    datasets.disable_progress_bars()
    with _one_line(f"{name}: no such file, and as a dataset of the hub it"):
        table = datasets.load_dataset(source, config, split=split)
    return _numbered(source, [dict(row) for row in table])


def make_gym(source: str, config: str | None, split: str, *, option: str = "dataset") -> Any:
    """A procedural dataset of reasoning-gym, equal for equal arguments.

    Raises:
        ConfigError: the package is missing, or it has no such dataset or setting.
    """
    name = f"{option}={source!r}"
    gym = import_extra("reasoning_gym", extra="reasoning-gym", option=name)
    with _one_line(name):
        settings = {"seed": 0 if split == "train" else _HELD_OUT_SEED} | json.loads(config or "{}")
        return gym.create_dataset(source.removeprefix(REASONING_GYM), **settings)


def _numbered(source: str, rows: list[dict[str, Any]]) -> Rows:
    if not rows:
        raise ConfigError(f"{source}: no rows; give a dataset or split that has some")
    raw = json.dumps(rows, sort_keys=True, default=str).encode()
    where = [f"{source}, row {n}" for n in range(1, len(rows) + 1)]
    return Rows(where, rows, hashlib.sha256(raw).hexdigest())


def _read_file(path: Path, name: str) -> Rows:
    """The rows and the sha256 of one reading: the file may change between two."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read ({error.strerror})") from error
    if not raw:
        raise ConfigError(f"{name}: the file is empty; give one row per line")
    sha256 = hashlib.sha256(raw).hexdigest()
    if path.suffix not in _READERS:
        lines = raw.rstrip().split(b"\n")
        where = [f"{path}, line {n}" for n in range(1, len(lines) + 1)]
        return Rows(where, [*map(_parse_line, lines, where)], sha256)
    datasets = import_extra("datasets", extra="data", option=name)
    datasets.disable_progress_bars()
    # Without a cache of its own the file would be copied into the user's.
    with tempfile.TemporaryDirectory() as cache, _one_line(name):
        table = datasets.load_dataset(
            _READERS[path.suffix],
            data_files=str(path),
            split="train",
            cache_dir=cache,
            keep_in_memory=True,
        )
        return _numbered(str(path), [dict(row) for row in table])._replace(sha256=sha256)


def _parse_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()  # an escape can make half a character
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: Invalid JSON: {error}; give one object a line") from error
    if not isinstance(row, dict):
        raise ConfigError(
            f"{where}: {row!r:.60} is no object; give one with a prompt and an answer"
        )
    return row


@contextlib.contextmanager
def _one_line(name: str) -> Iterator[None]:
    """Turn what a library raises into a ConfigError: their classes differ with the failure."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())
        raise ConfigError(
            f"{name} cannot be loaded ({type(error).__name__}: {said:.200}); check the name, its "
            "configuration and split, or the connection"
        ) from error
