"""Checkpoints are whole or absent, whatever happens to the process or to the files."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_rl.config import ConfigError
from moe_rl.run_folder.checkpoints import Checkpoints
from moe_rl.run_folder.sealing import MANIFEST


def filled(text: str) -> Callable[[Path], None]:
    def fill(path: Path) -> None:
        (path / "weights").mkdir()
        (path / "weights" / "model").write_text(text * 100)
        (path / "state.json").write_text(text)

    return fill


def write(folder: Path, step: int, text: str = "x", reward: float = 0.0) -> Path:
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.write(step, filled(text), reward=reward)
    return checkpoints.path(step)


def newest(folder: Path) -> tuple[str | None, list[str]]:
    told: list[str] = []
    found = Checkpoints(folder / "checkpoints").newest(told.append)
    return (None if found is None else found.name), told


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir() if path.is_dir())


def truncate(path: Path) -> None:
    file = path / "weights" / "model"
    file.write_bytes(file.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    file = path / "weights" / "model"
    data = bytearray(file.read_bytes())
    data[7] ^= 1
    file.write_bytes(data)


def lose_a_file(path: Path) -> None:
    (path / "weights" / "model").unlink()


def lose_the_manifest(path: Path) -> None:
    (path / MANIFEST).unlink()


def break_the_manifest(path: Path) -> None:
    (path / MANIFEST).write_text('{"schema": 1, "files"')


DAMAGES = {
    truncate: "weights/model: not as it was written (99 bytes of 100",
    flip_a_bit: "weights/model: not as it was written",
    lose_a_file: "weights/model: cannot be read",
    lose_the_manifest: "manifest.json: cannot be read",
    break_the_manifest: "manifest.json: not a manifest",
}


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert newest(tmp_path) == (None, [])


def test_the_best_and_the_newest_two_stay(tmp_path: Path) -> None:
    for step, reward in enumerate([0.1, 0.9, 0.2, 0.3, 0.4]):
        write(tmp_path, step, reward=reward)
    assert names(tmp_path) == ["00001", "00003", "00004"]
    assert newest(tmp_path) == ("00004", [])


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_named_and_passed_over(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    paths = [write(tmp_path, step) for step in range(2)]
    damage(paths[1])
    name, told = newest(tmp_path)
    assert name == "00000"
    (message,) = told
    assert DAMAGES[damage] in message
    damage(paths[0])
    with pytest.raises(ConfigError, match="no checkpoint is whole"):
        newest(tmp_path)


def test_a_damaged_checkpoint_takes_no_place_among_those_kept(tmp_path: Path) -> None:
    """It is newer than what the run fell back to, and says that it was the best."""
    for step in (1, 2, 5):
        path = write(tmp_path, step, reward=float(step))
    flip_a_bit(path)
    write(tmp_path, 3)
    assert names(tmp_path) == ["00002", "00003"]
    assert newest(tmp_path) == ("00003", [])


def test_after_falling_back_the_run_replaces_what_it_passed(tmp_path: Path) -> None:
    write(tmp_path, 0)
    flip_a_bit(write(tmp_path, 1))
    path = write(tmp_path, 1, "again")
    assert newest(tmp_path) == ("00001", [])
    assert (path / "state.json").read_text() == "again"


def test_latest_wins_over_a_later_name(tmp_path: Path) -> None:
    """A run that died before it moved `latest` resumes from where it was, not from beyond."""
    for step in (3, 5):
        write(tmp_path, step)
    (tmp_path / "checkpoints" / "latest").write_text("00003\n")
    assert newest(tmp_path) == ("00003", [])
    (tmp_path / "checkpoints" / "latest").unlink()
    assert newest(tmp_path) == ("00005", [])


def test_all_of_a_checkpoint_is_on_the_disk_before_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rename may reach the disk before the bytes of what it renames."""
    flushed: set[Path] = set()
    moved: list[Path] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        flushed.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def noted_replace(source: Path, target: Path) -> None:
        inside = [source, *source.rglob("*")] if source.is_dir() else [source]
        assert set(inside) <= flushed, "renamed before it was flushed"
        replace(source, target)
        flushed.discard(target.parent)
        moved.append(target.parent)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    write(tmp_path, 0)
    assert moved and set(moved) <= flushed, "a rename that was not flushed"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failure_at_any_write_leaves_what_was_there(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills up, or the process dies, at the n-th flush or rename, for every n."""
    real = getattr(os, call)
    for fails_at in range(100):
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
        write(tmp_path, 0, "old")
        left = iter(range(fails_at))

        def failing(*arguments: object, left: object = left, **options: object) -> object:
            if next(left, None) is None:  # type: ignore[call-overload]
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments, **options)

        monkeypatch.setattr(os, call, failing)
        try:
            write(tmp_path, 1, "new")
            done = True
        except OSError:
            done = False
        monkeypatch.setattr(os, call, real)
        name, told = newest(tmp_path)
        assert not told
        if done:
            break
        state = tmp_path / "checkpoints" / str(name) / "state.json"
        assert state.read_text() in ("old", "new")
    assert fails_at >= (2 if call == "replace" else 5) and name == "00001"


def test_what_a_dead_process_left_behind_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / ".partial-00000" / "weights").mkdir(parents=True)
    assert newest(tmp_path) == (None, [])
    write(tmp_path, 0)
    assert newest(tmp_path) == ("00000", []) and names(tmp_path) == ["00000"]
