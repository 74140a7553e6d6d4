"""Damaged trace files: a trace or one error that begins with the path; nothing is unpickled."""

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from trace_faults import nemo, parquet, payload

from moe_rl.traces import read_trace

L, K = 2, 2
IDS = np.random.default_rng(0).random((2, 5, L, 6)).argsort(axis=-1)[..., :K].astype(np.int16)


def written(save: Callable[..., None], *arrays: np.ndarray, **named: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    save(buffer, *arrays, **named)
    return buffer.getvalue()


def text(value: Any) -> bytes:
    return json.dumps(value).encode()


FLAT = base64.b64encode(IDS[0].astype("<i4").tobytes()).decode()
NPY = base64.b64encode(written(np.save, IDS[0])).decode()
LINES = [
    {"block": "decoder", "layer": n, "num_tokens": 5, "topk": K, "top_indices": ids.tolist()}
    for n, ids in enumerate(IDS[0].transpose(1, 0, 2))
]
WHOLE: dict[str, bytes] = {
    "plain.npz": written(np.savez, routed_experts=IDS),
    "packed.npz": written(np.savez_compressed, routed_experts=IDS, tokens=np.zeros(3)),
    "plain.npy": written(np.save, IDS),
    "ours.safetensors": save({"routed_experts": torch.from_numpy(IDS)}),
    "vllm.json": text({"choices": [{"routed_experts": row.tolist()} for row in IDS]}),
    "base64.json": text({"outputs": [{"routed_experts": NPY}]}),
    "sglang.json": text([{"meta_info": {"routed_experts": FLAT}}]),
    "megatron.jsonl": b"\n".join(map(text, LINES)),
    "lines.jsonl": b"\n".join(text({"choices": [{"routed_experts": NPY}]}) for _ in range(2)),
    "nemo.json": text({"choices": [{"message": {"routed_experts": nemo(IDS[0])}}]}),
    "object.json": text({"choices": [{"routed_experts": payload(IDS[0])}]}),
    "lists.parquet": parquet([{"routed_experts": row.tolist()} for row in IDS]),
}


@pytest.mark.parametrize("name", WHOLE)
@settings(max_examples=30)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_that_was_cut_off_is_an_error_with_the_path(
    name: str, share: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("cut") / name
    path.write_bytes(WHOLE[name])
    assert read_trace(path, num_layers=L, top_k=K).routed_experts.shape[1:] == (5, L, K)
    path.write_bytes(WHOLE[name][: int(share * len(WHOLE[name]))])
    try:
        # Lines that end with a line are whole, if fewer.
        routes = read_trace(path, num_layers=L, top_k=K).routed_experts
        assert name.endswith(".jsonl") and (routes.shape[2] < L or len(routes) < 2)
    except ValueError as error:
        assert str(error).startswith(f"{path}: ")


@given(
    raw=st.binary(max_size=64),
    suffix=st.sampled_from(["npz", "npy", "safetensors", "json", "parquet"]),
)
def test_other_bytes_are_an_error_with_the_path(
    raw: bytes, suffix: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("bytes") / f"x.{suffix}"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=rf"{path}: "):
        read_trace(path)


KEYS = [
    "routed_experts", "prompt_routed_experts", "choices", "outputs", "meta_info", "message",
    "response", "body", "error", "usage", "custom_id", "prompt_token_ids", "token_ids",
    "prompt_tokens", "completion_tokens", "dtype", "start", "shape", "data",
    "routed_experts_start_len", "routed_experts_dtype",
]  # fmt: skip
LEAVES = st.sampled_from([None, True, -1, 3, 10**30, 0.5, "", "uint8", NPY, FLAT, IDS[0].tolist()])
CHANGES = st.dictionaries(st.sampled_from(KEYS), LEAVES, max_size=2)


@settings(max_examples=100)
@given(response=CHANGES, choice=CHANGES, array=CHANGES, lines=st.booleans())
def test_a_response_of_wrong_fields_is_a_trace_or_an_error_with_the_path(
    response: dict[str, Any],
    choice: dict[str, Any],
    array: dict[str, Any],
    lines: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    one = {"token_ids": [6] * 3, "routed_experts": payload(IDS[0]) | array} | choice
    content = {"prompt_token_ids": [5, 5], "choices": [one], "usage": {}} | response
    path = tmp_path_factory.mktemp("json") / ("x.jsonl" if lines else "x.json")
    path.write_bytes(text(content))
    try:
        assert read_trace(path, num_layers=L, top_k=K).routed_experts.ndim == 4
    except ValueError as error:
        assert str(error).startswith(f"{path}: ")


def test_a_flipped_bit_of_an_npz_is_found_by_its_checksum(tmp_path: Path) -> None:
    raw = bytearray(WHOLE["plain.npz"])
    raw[raw.index(IDS.tobytes())] ^= 1
    (tmp_path / "x.npz").write_bytes(raw)
    with pytest.raises(ValueError, match=r"x\.npz: Bad CRC-32"):
        read_trace(tmp_path / "x.npz")


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.path,)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    objects = np.empty((1, 1, 1, 1), dtype=object)
    objects[0, 0, 0, 0] = Payload(tmp_path / "ran")
    np.save(tmp_path / "o.npy", objects)
    np.savez(tmp_path / "o.npz", routed_experts=objects)
    inside = base64.b64encode((tmp_path / "o.npy").read_bytes()).decode()
    (tmp_path / "o.json").write_text(json.dumps({"routed_experts": inside}))
    for name in ("o.npy", "o.npz", "o.json"):
        with pytest.raises(ValueError, match=r"o\..*no arrays of numbers"):
            read_trace(tmp_path / name)
    assert not (tmp_path / "ran").exists()
