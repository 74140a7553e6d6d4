"""Checkpoints are whole or absent, whatever happens to the process or to the files."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import write_manifest

from moe_rl.config import ConfigError
from moe_rl.run_folder.checkpoints import Checkpoints
from moe_rl.run_folder.sealing import MANIFEST


def filled(text: str) -> Callable[[Path], None]:
    def fill(path: Path) -> None:
        (path / "weights").mkdir()
        (path / "weights" / "model").write_text(text * 100)
        (path / "state.json").write_text(text)

    return fill


def store(folder: Path, identity: str = "run", **options: int) -> Checkpoints:
    return Checkpoints(folder / "checkpoints", identity=identity, **options)


def newest(folder: Path, **options: str) -> tuple[str | None, list[str]]:
    told: list[str] = []
    found = store(folder, **options).newest(told.append)
    return (None if found is None else found.path.name), told


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "checkpoints").iterdir() if p.is_dir())


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert newest(tmp_path) == (None, [])


def test_the_newest_is_found_and_says_where_it_stands(tmp_path: Path) -> None:
    for step in range(3):
        store(tmp_path).write(step, step, filled(str(step)), score=0.5)
    found = store(tmp_path).newest(pytest.fail)
    assert found is not None
    assert (found.step, found.update, found.score) == (2, 2, 0.5)
    assert (found.path / "state.json").read_text() == "2"


def test_the_best_and_the_last_stay(tmp_path: Path) -> None:
    for step, score in enumerate([0.1, 0.9, 0.2, 0.3, 0.4]):
        store(tmp_path).write(step, 0, filled("x"), score=score)
    assert names(tmp_path) == ["00001-00", "00003-00", "00004-00"]
    with pytest.raises(ConfigError, match="keep_last=1: at least 2"):
        store(tmp_path, keep_last=1)


def damage_nothing(path: Path) -> None:
    pass


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


def empty_the_manifest(path: Path) -> None:
    (path / MANIFEST).write_text('{"schema": 1}')


def change_the_identity(path: Path) -> None:
    change(path, lambda manifest: manifest | {"identity": manifest["identity"][::-1]})


def change_the_score(path: Path) -> None:
    change(path, lambda manifest: manifest | {"score": "x"})


def forget_a_file(path: Path) -> None:
    change(path, lambda manifest: manifest | {"files": {}})
    shutil.rmtree(path / "weights")


def change(path: Path, how: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    manifest = path / MANIFEST
    manifest.write_text(json.dumps(how(json.loads(manifest.read_text()))))


def add_a_file(path: Path) -> None:
    """Libraries take a file of the right name for a part of the model."""
    (path / "weights" / "adapter_config.json").write_text("{}")


DAMAGES = {
    truncate: "weights/model: 99 bytes of 100",
    flip_a_bit: "weights/model: not what was written",
    lose_a_file: "weights/model: cannot be read",
    lose_the_manifest: "manifest.json: cannot be read",
    break_the_manifest: "manifest.json: cannot be read",
    empty_the_manifest: "manifest.json: not what was written",
    change_the_identity: "manifest.json: not what was written",
    change_the_score: "manifest.json: not what was written",
    forget_a_file: "manifest.json: not what was written",
    add_a_file: "adapter_config.json: not a file of this folder",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_named_and_passed_over(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    for step in range(2):
        store(tmp_path).write(step, 0, filled(str(step)), score=0.0)
    damage(tmp_path / "checkpoints" / "00001-00")
    name, told = newest(tmp_path)
    assert name == "00000-00"
    (message,) = told
    assert DAMAGES[damage] in message
    damage(tmp_path / "checkpoints" / "00000-00")
    with pytest.raises(ConfigError, match="no checkpoint is whole"):
        newest(tmp_path)


def test_a_hidden_file_of_the_system_does_no_harm(tmp_path: Path) -> None:
    store(tmp_path).write(0, 0, filled("x"), score=0.0)
    (tmp_path / "checkpoints" / "00000-00" / "weights" / ".nfs0001").write_text("")
    (tmp_path / "checkpoints" / "00000-00" / ".snapshot").mkdir()
    (tmp_path / "checkpoints" / "00000-00" / ".snapshot" / "copy").write_text("")
    assert newest(tmp_path) == ("00000-00", [])


def test_a_damaged_checkpoint_takes_no_place_among_those_kept(tmp_path: Path) -> None:
    """It is newer than what the run went back to, and says that it was the best."""
    for step in range(3):
        store(tmp_path).write(step, 0, filled(str(step)), score=float(step))
    flip_a_bit(tmp_path / "checkpoints" / "00002-00")
    gone_back = store(tmp_path)
    assert gone_back.newest(lambda message: None) is not None
    gone_back.set_damaged_aside()
    gone_back.write(1, 3, filled("on"), score=0.0)
    assert names(tmp_path) == [".damaged-00002-00", "00001-00", "00001-03"]
    flip_a_bit(tmp_path / "checkpoints" / "00001-03")
    assert newest(tmp_path)[0] == "00001-00"


def test_all_of_a_checkpoint_is_on_the_disk_before_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rename may reach the disk before the bytes of what it renames."""
    flushed: set[Path] = set()
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

    moved: list[Path] = []
    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    store(tmp_path).write(0, 0, filled("x"), score=0.0)
    assert moved and set(moved) <= flushed, "a rename that was not flushed"


def test_after_going_back_the_run_writes_over_what_it_passed(tmp_path: Path) -> None:
    for step in range(2):
        store(tmp_path).write(step, 0, filled(str(step)), score=0.0)
    flip_a_bit(tmp_path / "checkpoints" / "00001-00")
    store(tmp_path).write(1, 0, filled("again"), score=0.0)
    assert newest(tmp_path) == ("00001-00", [])


def test_latest_wins_over_a_later_name(tmp_path: Path) -> None:
    """A run that went back and was killed again goes on from where it was, not from beyond."""
    for step in (5, 3):
        store(tmp_path).write(step, 0, filled(str(step)), score=0.0)
    assert newest(tmp_path) == ("00003-00", [])
    (tmp_path / "checkpoints" / "latest").write_text("../../etc")
    assert newest(tmp_path) == ("00005-00", [])


def test_another_run_and_a_newer_schema_are_refused(tmp_path: Path) -> None:
    store(tmp_path).write(0, 0, filled("x"), score=0.0)
    with pytest.raises(ConfigError, match="a checkpoint of another run"):
        newest(tmp_path, identity="other")
    write_manifest(tmp_path / "checkpoints" / "00000-00", schema=99)
    with pytest.raises(ConfigError, match="schema 99, this version reads schema 1"):
        newest(tmp_path)


CALLS = ("fsync", "replace")


@pytest.mark.parametrize("call", CALLS)
def test_a_failure_at_any_write_leaves_what_was_there(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills up, or the process dies, at the n-th flush or rename, for every n."""
    store(tmp_path).write(0, 0, filled("old"), score=0.0)
    real = getattr(os, call)
    survived = 0
    for fails_at in range(100):
        left = [fails_at]

        def failing(*arguments: object, left: list[int] = left, **options: object) -> object:
            if left[0] == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            left[0] -= 1
            return real(*arguments, **options)

        monkeypatch.setattr(os, call, failing)
        try:
            store(tmp_path).write(1, 0, filled("new"), score=0.0)
            done = True
        except OSError:
            done = False
        monkeypatch.setattr(os, call, real)
        name, told = newest(tmp_path)
        assert not told
        found = tmp_path / "checkpoints" / str(name)
        assert (found / "state.json").read_text() in ("old", "new")
        if done:
            break
        survived += 1
        shutil.rmtree(tmp_path / "checkpoints")
        store(tmp_path).write(0, 0, filled("old"), score=0.0)
    assert done and survived >= (2 if call == "replace" else 5)
    assert newest(tmp_path)[0] == "00001-00"


def test_what_a_dead_process_left_behind_is_swept_away(tmp_path: Path) -> None:
    store(tmp_path).write(0, 0, filled("x"), score=0.0)
    (tmp_path / "checkpoints" / ".partial-dead").mkdir()
    assert newest(tmp_path) == ("00000-00", [])
    store(tmp_path).write(1, 0, filled("x"), score=0.0)
    assert ".partial-dead" not in names(tmp_path)
