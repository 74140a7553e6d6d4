"""Trace readers against whatever a file may hold: routes, or an error with the path; never more.

No other exception, no memory beyond a small multiple of the file's size, no code.
"""

import base64
import io
import json
import os
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_rl.traces import read_trace, write_trace
from moe_rl.traces.limits import ALWAYS, EXPANSION

L, K = 2, 2
IDS = np.random.default_rng(0).random((2, 5, L, 6)).argsort(axis=-1)[..., :K].astype(np.int16)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npz(save: Callable[..., None], **arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    save(buffer, **arrays)
    return buffer.getvalue()


def safetensors() -> bytes:
    from safetensors.torch import save

    return save({"routed_experts": torch.from_numpy(IDS)})


def text(value: Any) -> bytes:
    return json.dumps(value).encode()


def megatron() -> bytes:
    rows = [
        {"block": "decoder", "layer": n, "num_tokens": 5, "topk": K, "top_indices": ids.tolist()}
        for n, ids in enumerate(IDS[0].transpose(1, 0, 2))
    ]
    return b"".join(text(row) + b"\n" for row in rows)


PROMPT = {"prompt_routed_experts": IDS[0, :2].tolist()}
FLAT = base64.b64encode(IDS[0].astype("<i4").tobytes()).decode()
VALID: dict[str, bytes] = {
    "plain.npz": npz(np.savez, routed_experts=IDS),
    "packed.npz": npz(np.savez_compressed, routed_experts=IDS, tokens=np.zeros(3)),
    "vllm.npz": npz(np.savez, routed_experts=IDS[0, 2:], prompt_routed_experts=IDS[0, :2]),
    "plain.npy": npy(IDS),
    "ours.safetensors": safetensors(),
    "vllm.json": text({"choices": [{"routed_experts": row.tolist()} for row in IDS]}),
    "vllm21.json": text(PROMPT | {"choices": [{"routed_experts": IDS[0, 2:].tolist()}]}),
    "base64.json": text({"outputs": [{"routed_experts": base64.b64encode(npy(IDS[0])).decode()}]}),
    "sglang.json": text([{"meta_info": {"routed_experts": FLAT}}]),
    "megatron.jsonl": megatron(),
}


def read(path: Path) -> np.ndarray | None:
    """The routes if the file is a trace; None if it was refused as it should be."""
    try:
        routes = read_trace(path, num_layers=L, top_k=K).routed_experts
    except (ValueError, OSError) as error:
        assert str(path) in str(error), error
        return None
    assert routes.dtype == torch.int16 and routes.ndim == 4
    return routes.numpy()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.parametrize("name", VALID)
def test_the_files_that_are_changed_here_are_whole(name: str, folder: Path) -> None:
    (folder / name).write_bytes(VALID[name])
    assert read(folder / name) is not None


@st.composite
def changed(draw: st.DrawFn, raw: bytes) -> bytes:
    """A file with some bits flipped, bytes put in, taken out, or its end cut off."""
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(raw) - 1)))
        match draw(st.sampled_from(["flip", "insert", "delete", "cut", "repeat"])):
            case "flip":
                bit = 1 << draw(st.integers(0, 7))
                raw = raw[:at] + bytes(byte ^ bit for byte in raw[at : at + 1]) + raw[at + 1 :]
            case "insert":
                raw = raw[:at] + draw(st.binary(min_size=1, max_size=8)) + raw[at:]
            case "delete":
                raw = raw[:at] + raw[at + draw(st.integers(1, 16)) :]
            case "cut":
                raw = raw[:at]
            case "repeat":
                raw = raw[:at] + raw[at : at + 32] * 2 + raw[at + 32 :]
    return raw


@pytest.mark.parametrize("name", VALID)
@settings(max_examples=150)
@given(data=st.data())
def test_a_damaged_file_is_a_trace_or_an_error_with_the_path(
    name: str, data: st.DataObject, folder: Path
) -> None:
    (folder / name).write_bytes(data.draw(changed(VALID[name])))
    read(folder / name)


HEADS = {
    "x.npy": b"\x93NUMPY\x01\x00",
    "x.npz": b"PK\x03\x04",
    "x.safetensors": (8).to_bytes(8, "little"),
    "x.json": b'{"routed_experts": ',
    "x.jsonl": b'{"layer": 0, "top_indices": ',
}


@pytest.mark.parametrize("name", HEADS)
@settings(max_examples=100)
@given(raw=st.binary(max_size=200), headed=st.booleans())
def test_any_bytes_are_a_trace_or_an_error_with_the_path(
    name: str, raw: bytes, headed: bool, folder: Path
) -> None:
    (folder / name).write_bytes(HEADS[name] * headed + raw)
    read(folder / name)


# Headers that declare what they like, in the form that numpy writes and in others.
SIZES = st.integers(-2, 10) | st.integers(0, 2**70)
TYPES = st.sampled_from(["<i2", ">i8", "|u1", "<u8", "<f4", "|O", "<U9", "V1000000000", "<i16"])


def npy_of(header: str, data: bytes, version: int = 1) -> bytes:
    size = len(header).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + size + header.encode("latin-1") + data


@settings(max_examples=300)
@given(
    kind=TYPES,
    shape=st.lists(SIZES, max_size=6),
    fortran=st.booleans(),
    data=st.binary(max_size=64),
    version=st.integers(0, 4),
)
def test_a_header_may_declare_what_it_likes(
    kind: str, shape: list[int], fortran: bool, data: bytes, version: int, folder: Path
) -> None:
    header = {"descr": kind, "fortran_order": fortran, "shape": tuple(shape)}
    raw = npy_of(f"{header}\n", data, version)
    (folder / "h.npy").write_bytes(raw)
    routes = read(folder / "h.npy")
    assert routes is None or routes.size * np.dtype(kind).itemsize <= len(data)
    with zipfile.ZipFile(folder / "h.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("routed_experts.npy", raw)
    again = read(folder / "h.npz")
    assert (routes is None) == (again is None)


@pytest.mark.parametrize(
    "header",
    [
        "[" * 5000,
        "{'descr': " + "(" * 3000,
        "-" * 9000 + "1",
        "{'descr': [('a', '<i4', 1000000000000)], 'fortran_order': False, 'shape': (1,), }",
        "{1: 2, 'descr': '<i2', 'fortran_order': False, 'shape': (1,)}",
        "{'descr': '<i2', 'fortran_order': False, 'shape': (1, 1, 1, 1)} + exit()",
        "{'descr': '<i2', 'fortran_order': False, 'shape': ((1,), 1)}",
        "\0",
    ],
)
def test_a_header_is_never_evaluated(header: str, folder: Path) -> None:
    for version in (1, 2, 3):
        (folder / "e.npy").write_bytes(npy_of(header, b"\0" * 64, version))
        assert read(folder / "e.npy") is None


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    objects = np.empty((1, 1, 1, 1), dtype=object)
    objects[0, 0, 0, 0] = Payload(tmp_path / "ran")
    np.save(tmp_path / "o.npy", objects)
    np.savez(tmp_path / "o.npz", routed_experts=objects)
    inside = base64.b64encode((tmp_path / "o.npy").read_bytes()).decode()
    (tmp_path / "o.json").write_text(json.dumps({"routed_experts": inside}))
    for name in ("o.npy", "o.npz", "o.json"):
        with pytest.raises(ValueError, match=r"o\..*'\|O', not integer ids"):
            read_trace(tmp_path / name)
    assert not (tmp_path / "ran").exists()
    np.load(tmp_path / "o.npy", **{"allow_" + "pickle": True})
    assert (tmp_path / "ran").exists(), "the test needs a file that would have run"


# Memory: files of kilobytes that declare gigabytes.


def bomb(path: Path, size: int) -> None:
    """An npz that unpacks to `size` bytes of zeros, a thousandth of that on the disk."""
    start = npy_of(
        f"{{'descr': '<i2', 'fortran_order': False, 'shape': (1, {size // 20}, 1, 10), }}", b""
    )
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("routed_experts.npy", "w") as member,
    ):
        member.write(start)
        for _ in range(size // 2**20):
            member.write(b"\0" * 2**20)


def lying_bomb(path: Path) -> None:
    """The same, and the directory of the archive says that it is small."""
    honest = path.with_name("honest.npz")
    bomb(honest, 200 * 2**20)
    size = zipfile.ZipFile(honest).infolist()[0].file_size
    path.write_bytes(
        honest.read_bytes().replace(size.to_bytes(4, "little"), (2000).to_bytes(4, "little"))
    )


def one_long_text(path: Path) -> None:
    """numpy would give each of the short texts the room of the long one: 80 GB."""
    path.write_text(json.dumps({"routed_experts": [[["a"] * 20_000 + ["b" * 1_000_000]]]}))


def one_long_row(path: Path) -> None:
    """One row of 20,000 tokens among 20,000 of one token: filled up, 800 MB."""
    rows = [[[[1]]]] * 20_000 + [[[[1]]] * 20_000]
    path.write_text(json.dumps([{"routed_experts": row} for row in rows]))


def one_long_prompt(path: Path) -> None:
    """A prompt of 10,000 tokens that 10,000 completions share: 800 MB."""
    choices = [{"routed_experts": [[[1]]]}] * 10_000
    prompt = {"prompt_routed_experts": [[[1]]] * 10_000}
    path.write_text(json.dumps(prompt | {"choices": choices}))


def no_rows_of_many(path: Path) -> None:
    """A hundred billion rows of nothing."""
    path.write_bytes(
        npy_of(str({"descr": "<i2", "fortran_order": False, "shape": (10**11, 0, 1, 1)}), b"")
    )


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("bomb.npz", lambda path: bomb(path, 200 * 2**20)),
        ("lying.npz", lying_bomb),
        ("text.json", one_long_text),
        ("row.json", one_long_row),
        ("prompt.json", one_long_prompt),
        ("nothing.npy", no_rows_of_many),
    ],
)
def test_memory_stays_within_a_multiple_of_the_file(
    name: str, make: Callable[[Path], None], tmp_path: Path
) -> None:
    """Python's and numpy's memory is counted; torch gets what `check_size` let through."""
    make(tmp_path / name)
    size = (tmp_path / name).stat().st_size
    tracemalloc.start()
    try:
        assert read(tmp_path / name) is None
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * max(ALWAYS, EXPANSION * size), f"{peak} bytes for a file of {size}"


def test_a_trace_that_packs_well_is_still_read(tmp_path: Path) -> None:
    """The same two experts at every token: a hundred times smaller on the disk."""
    ids = np.broadcast_to(np.arange(2, dtype=np.int16), (4, 5000, 16, 2))
    np.savez_compressed(tmp_path / "dense.npz", routed_experts=ids)
    assert ids.nbytes > 50 * (tmp_path / "dense.npz").stat().st_size
    assert np.array_equal(read_trace(tmp_path / "dense.npz").routed_experts, ids)


def test_arrays_are_read_as_numpy_reads_them(tmp_path: Path) -> None:
    for array in (IDS, np.asfortranarray(IDS), IDS.astype(">i8"), IDS.astype(np.uint8)):
        np.save(tmp_path / "a.npy", array)
        assert np.array_equal(read_trace(tmp_path / "a.npy").routed_experts, array)
    write_trace(tmp_path / "a.safetensors", torch.from_numpy(IDS).to(torch.bfloat16))
    with pytest.raises(ValueError, match=r"a\.safetensors: routed_experts: BF16, not integer"):
        read_trace(tmp_path / "a.safetensors")


def test_what_has_no_end_is_no_trace(tmp_path: Path) -> None:
    (tmp_path / "x.json").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "x.jsonl")
    for name in ("x.json", "x.jsonl"):
        with pytest.raises(ValueError, match=rf"{name}: not a file"):
            read_trace(tmp_path / name)


def test_a_line_end_of_unicode_ends_no_line(tmp_path: Path) -> None:
    row = json.loads(megatron().splitlines()[0]) | {"note": "a\u2028b\x85c"}
    (tmp_path / "t.jsonl").write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    assert read(tmp_path / "t.jsonl") is not None


def test_a_member_packed_in_other_ways_is_refused(tmp_path: Path) -> None:
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        with zipfile.ZipFile(tmp_path / "x.npz", "w", method) as archive:
            archive.writestr("routed_experts.npy", npy(IDS))
        with pytest.raises(ValueError, match="packed in another way"):
            read_trace(tmp_path / "x.npz")
