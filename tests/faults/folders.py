"""Faults of run and study folders."""

import ctypes
import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest
from faults.options import a_file, circle
from faults.table import Fault

from moe_rl.config import SCHEMA, preset

TRAIN = ("train", "--preset", "tiny", "--steps", "1", "--sft-steps", "2", "--out")
CAP_DAC_OVERRIDE, PR_CAPBSET_DROP = 1, 24


def run_of(folder: Path, **changes: Any) -> Path:
    """run/ with the config that TRAIN makes."""
    config = preset("tiny").replace(**{"steps": 1, "sft_steps": 2} | changes).named()
    (folder / "run").mkdir()
    values = {"schema": SCHEMA, "config": config.to_dict()}
    (folder / "run" / "config.json").write_text(json.dumps(values))
    return folder / "run"


def thesis(folder: Path) -> None:
    (folder / "thesis").mkdir()
    (folder / "thesis" / "chapter1.tex").write_text("precious")


def shut(folder: Path) -> None:
    (folder / "shut").mkdir(mode=0o555)


def bound_by_permissions() -> None:
    """Take from root the power to write where permissions say no; others never had it."""
    if os.geteuid() == 0:
        ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0)


def damaged(folder: Path) -> None:
    (run_of(folder) / "config.json").write_text('{"schema": 1, "conf')


def in_use(folder: Path) -> Any:
    file = (run_of(folder) / "lock").open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def full_disk(folder: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this system")
    (run_of(folder) / "steps.jsonl").symlink_to("/dev/full")


def lines(*steps: str) -> Any:
    def given(folder: Path) -> None:
        run = run_of(folder)
        (run / "steps.jsonl").write_text("".join(f"{line}\n" for line in steps))
        (run / "updates.jsonl").touch()

    return given


def other_schema(folder: Path) -> None:
    lines()(folder)
    (folder / "run" / "config.json").write_text('{"schema": 99, "config": {}}')


def study_of_others(folder: Path) -> None:
    thesis(folder)
    (folder / "thesis" / "study.json").write_text('{"schema": 1, "name": "mine"}')


RUN_FOLDERS = {
    "a file": Fault((*TRAIN, "a_file"), a_file),
    "a path through a file": Fault((*TRAIN, "a_file/run"), a_file),
    "links in a circle": Fault((*TRAIN, "loop"), circle),
    "a device": Fault((*TRAIN, "/dev/full")),
    "a name of 300 letters": Fault((*TRAIN, "x" * 300)),
    "no place for files": Fault((*TRAIN, "/proc/run")),
    "a folder without permission": Fault((*TRAIN, "shut/run"), shut, child=bound_by_permissions),
    "other files in it": Fault((*TRAIN, "thesis"), thesis),
    "a run of other settings": Fault((*TRAIN, "run", "--seed", "5"), run_of),
    "a run with a damaged config": Fault((*TRAIN, "run"), damaged),
    "a run that another process writes": Fault((*TRAIN, "run"), in_use),
    "a disk that is full at the cold start": Fault(
        (*TRAIN, "run"), torch=True, writes=True, file_size=20_000
    ),
    "a disk that is full during the run": Fault(
        (*TRAIN, "run"), full_disk, torch=True, writes=True
    ),
    "cold starts in a file": Fault(
        (*TRAIN, "run", "--cold-start-cache", "a_file"), a_file, torch=True
    ),
}

STUDIES = {
    "no folder to report": Fault(("report", "nowhere"), torch=True),
    "no run to report": Fault(("report", "thesis"), thesis, torch=True),
    "a run of another version": Fault(("report", "run"), other_schema, torch=True),
    "a broken line": Fault(
        ("report", "run"), lines('{"step": 0, "reward": 0.5}', '{"st', "{}"), torch=True
    ),
    "a study in a file": Fault(("reproduce", "--out", "a_file"), a_file, torch=True),
    "a study among other files": Fault(("reproduce", "--out", "thesis"), thesis, torch=True),
    "another study": Fault(("reproduce", "--out", "thesis"), study_of_others, torch=True),
}
