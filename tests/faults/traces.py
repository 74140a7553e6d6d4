"""Faults of recorded traces."""

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from faults.table import Fault

from moe_rl.traces import write_trace

IDS = np.tile(np.arange(2, dtype=np.int16), (1, 4, 2, 1))
LINE = {"layer": 1, "num_tokens": 2, "topk": 1, "top_indices": [[0], [1]]}


def trace(name: str, content: bytes | str | Callable[[Path], object]) -> Fault:
    """churn of a file with itself."""

    def given(folder: Path) -> None:
        if callable(content):
            content(folder / name)
        else:
            raw = content.encode() if isinstance(content, str) else content
            (folder / name).write_bytes(raw)

    return Fault(("churn", name, name), given, torch=True)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def zeros(path: Path) -> None:
    """An npz of 50 kB that unpacks to 50 MB."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("routed_experts.npy", npy(np.zeros((1, 25_000, 100, 10), np.int16)))


def cut_off(path: Path) -> None:
    write_trace(path, torch.from_numpy(IDS))
    path.write_bytes(path.read_bytes()[:-4])


def two_shapes(folder: Path) -> None:
    np.save(folder / "a.npy", IDS)
    np.save(folder / "b.npy", IDS[:, :, :1])


TRACES = {
    "not there": Fault(("churn", "t.npy", "t.npy"), torch=True),
    "another kind of file": trace("t.csv", "0,1\n"),
    "nothing in it": trace("t.npz", b""),
    "an array of another name": trace("t.npz", lambda path: np.savez(path, routes=IDS)),
    "objects, that is pickle": trace("t.npy", npy(np.array([{}], dtype=object))),
    "numbers that are no ids": trace("t.npy", npy(IDS.astype(float))),
    "less than it declares": trace("t.npy", npy(IDS).replace(b"4, 2, 2)", b"9, 2, 2)")),
    "far more than it holds": trace("t.npz", zeros),
    "cut off": trace("t.safetensors", cut_off),
    "not JSON": trace("t.json", '{"choices": [{"routed_'),
    "a response without routes": trace("t.json", '{"choices": [{"text": "hello"}]}'),
    "bytes without sizes": trace("t.json", '{"meta_info": {"routed_experts": "AAAA"}}'),
    "a line that is not JSON": trace("t.jsonl", json.dumps(LINE) + '\n{"layer": 1, "nu\n'),
    "an id below -1": trace("t.npy", npy(np.where(IDS == 0, -7, IDS))),
    "an expert twice": trace("t.npy", npy(np.full_like(IDS, 3))),
    "nothing recorded": trace("t.npy", npy(np.zeros_like(IDS))),
    "traces of two models": Fault(("churn", "a.npy", "b.npy"), two_shapes, torch=True),
}
