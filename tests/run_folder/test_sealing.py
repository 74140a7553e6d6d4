"""Sealed folders: what a writer that died has left behind."""

import os
import time
from pathlib import Path

from moe_rl.run_folder.sealing import is_whole, write_sealed


def test_what_dead_writers_left_goes_but_not_what_others_are_filling(tmp_path: Path) -> None:
    dead, alive = tmp_path / ".partial-dead", tmp_path / ".partial-alive"
    for folder in (dead, alive):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
    two_days_ago = time.time() - 2 * 86400
    os.utime(dead, (two_days_ago, two_days_ago))

    def fill(path: Path) -> None:
        (path / "file").write_text("x")

    write_sealed(tmp_path / "cold", fill, {})
    assert is_whole(tmp_path / "cold")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".partial-alive", "cold"]
