"""Faults of datasets."""

import json
from collections.abc import Callable
from pathlib import Path

from faults.folders import run_of
from faults.table import Fault

from moe_rl.config import SCHEMA, preset

TRAIN = ("train", "--preset", "tiny", "--task", "dataset", "--steps", "1", "--sft-steps", "2")
READ = (*TRAIN, "--dataset", "rows.jsonl", "--out", "run")
GOOD = b'{"prompt": "1+1=", "answer": "2"}\n'


def rows(text: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / "rows.jsonl").write_bytes(text)


def third(line: bytes) -> Fault:
    """Two good rows, this one and a good one."""
    return Fault(READ, rows(GOOD * 2 + line + b"\n" + GOOD))


def prompt_of(length: int) -> bytes:
    return json.dumps({"prompt": "1" * length, "answer": "2"}).encode() + b"\n"


def old_config(folder: Path) -> None:
    """old.json, of a run on a file that has another content since."""
    rows(GOOD)(folder)
    config = preset("tiny").replace(task="dataset", dataset="rows.jsonl", dataset_sha256="0" * 64)
    (folder / "old.json").write_text(json.dumps({"schema": SCHEMA, "config": config.to_dict()}))


def old_run(folder: Path) -> None:
    """run/, of a run on a file that has another content since."""
    rows(GOOD)(folder)
    run_of(folder, task="dataset", dataset="rows.jsonl", dataset_sha256="0" * 64)


DATASETS = {
    "no file is named": Fault((*TRAIN, "--out", "run")),
    "a file without the task": Fault(("train", "--dataset", "rows.jsonl"), rows(GOOD)),
    "not there": Fault(READ),
    "a folder": Fault(READ, lambda folder: (folder / "rows.jsonl").mkdir()),
    "no file but a device": Fault((*TRAIN, "--dataset", "/dev/zero", "--out", "run")),
    "nothing in it": Fault(READ, rows(b"")),
    "an empty line": third(b""),
    "a line that is not JSON": third(b'{"prompt": "1+1=", "answer": "2"'),
    "a line that is not text": third(b'{"prompt": "\xff", "answer": "2"}'),
    "a line that is no object": third(b'["1+1=", "2"]'),
    "brackets without end": third(b"[" * 100_000),
    "a key missing": third(b'{"prompt": "1+1="}'),
    "an unknown key": third(b'{"prompt": "1+1=", "answer": "2", "solution": "2"}'),
    "a key twice": third(b'{"prompt": "1+1=", "answer": "2", "answer": "3"}'),
    "a value that is no text": third(b'{"prompt": "1+1=", "answer": 2}'),
    "an empty prompt": third(b'{"prompt": "", "answer": "2"}'),
    "a NUL": third(b'{"prompt": "1+1=", "answer": "\\u0000"}'),
    "half a surrogate pair": third(b'{"prompt": "1+1=", "answer": "\\ud800"}'),
    "changed since the config was written": Fault(
        ("train", "--config", "old.json", "--out", "run"), old_config
    ),
    "changed since the run began": Fault((*READ, "--resume"), old_run),
    "a prompt that is too long for the model": Fault(
        READ, rows(GOOD + prompt_of(1024)), torch=True
    ),
    "an answer that is too long for a response": Fault(
        (*READ, "--response-tokens", "1"), rows(GOOD), torch=True
    ),
    "an answer that no response can be": Fault(
        READ, rows(GOOD + b'{"prompt": "2+2=", "answer": "<eos>"}\n'), torch=True
    ),
}
