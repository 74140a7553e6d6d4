"""Faults of recorded routes, each on a small record that imitates a bug of an engine, and formats.

A fault changes ids `[B, S, L, K]` in place, or returns others; its check is the one that finds it.
"""

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from safetensors.torch import save

E, K, L, S, B = 16, 2, 4, 24, 2
PROMPT = 8
"""Prompt tokens of a sequence; the rest are its response."""
RESPONSE = slice(PROMPT - 1, S - 1)
"""Where response tokens are predicted."""


def routes(rows: int = B, length: int = S, seed: int = 0) -> np.ndarray:
    """Ids `[B, S, L, K]`, different within a token."""
    draws = np.random.default_rng(seed).random((rows, length, L, E))
    return draws.argsort(axis=-1)[..., :K].astype(np.int32)


def tokens(rows: int = B) -> np.ndarray:
    """Token ids `[B, S]`, no two neighbours alike."""
    return np.arange(rows * S).reshape(rows, S) % 50 + 2


def _put(where: Any, value: Any) -> Callable[[np.ndarray], None]:
    return lambda ids: ids.__setitem__(where, value)


def _repeat(where: slice) -> Callable[[np.ndarray], None]:
    """The row before some tokens, over and over."""
    return lambda ids: ids.__setitem__((slice(None), where), ids[:, where.start - 1][:, None])


def _halves(ids: np.ndarray) -> None:
    ids[:, S // 2 :] = ids[:, : S // 2]


def _twice(ids: np.ndarray) -> None:
    ids[:, 1::2] = ids[:, ::2]


def _layer(ids: np.ndarray) -> None:
    ids[:, :, 1] = ids[0, 0, 1]


def _copy(ids: np.ndarray) -> None:
    ids[:, :, 2] = ids[:, :, 0, ::-1]


FAULTS: dict[str, tuple[str, Callable[[np.ndarray], None]]] = {
    "an id beyond the experts": ("ids", _put((0, 9, 2, 0), E)),
    "an expert twice": ("distinct", _put((1, 9, 2), 5)),
    "nothing recorded": ("zeros", _put(slice(None), 0)),
    "a layer not recorded": ("zeros", _put((slice(None), slice(None), 1), 0)),
    "a token of zeros in one layer": ("distinct", _put((1, 9, 2), 0)),
    "a token of zeros": ("last token", _put((slice(None), S - 2), 0)),
    "0..K-1 in every row": ("fillers", _put(slice(None), range(K))),
    "0..K-1 in the response": ("fillers", _put((slice(None), RESPONSE), range(K))),
    "0..K-1 in one lost row": ("fillers", _put((0, 12), range(K))),
    "one id of two": ("gaps", _put((0, 12, 1, 1), -1)),
    "one row lost": ("lost", _put((0, 12), -1)),
    "one row of one layer lost": ("lost", _put((1, 12, 3), -1)),
    "a sequence lost": ("lost", _put(1, -1)),
    "a layer copied": ("layers", _copy),
    "one row everywhere": ("tokens", _put(slice(None), [[3, 7], [1, 2], [9, 4], [0, 5]])),
    "a layer of one row": ("tokens", _layer),
    "each request its own row": ("tokens", _repeat(slice(1, S))),
    "every pass twice": ("passes", _halves),
    "every router twice": ("passes", _twice),
    "a run of one row": ("runs", _repeat(slice(PROMPT, PROMPT + 9))),
}
"""Name of the fault: the check that finds it, and what it does to a record."""


def spoiled(fault: str, ids: np.ndarray | None = None) -> np.ndarray:
    """A record with a fault."""
    ids = routes() if ids is None else ids
    FAULTS[fault][1](ids)
    return ids


# Formats: each writes the rows of some sequences, and what it can say about their tokens.


def text(value: Any) -> bytes:
    return json.dumps(value).encode()


def lines(values: Any) -> bytes:
    return b"\n".join(map(text, values))


def code(ids: np.ndarray, dtype: str) -> str:
    return base64.b64encode(
        np.ascontiguousarray(ids).astype(np.dtype(dtype).newbyteorder("<")).tobytes()
    ).decode()


def npy(ids: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, ids)
    return file.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def payload(ids: np.ndarray, kind: str = "int16", **more: Any) -> dict[str, Any]:
    """The object of prime-rl."""
    return {"data": code(ids, kind), "shape": list(ids.shape)} | more


def nemo(ids: np.ndarray) -> str:
    """The envelope of NeMo-RL, with its filler in the row of the last token."""
    filler = np.broadcast_to(np.arange(ids.shape[-1]), (1, *ids.shape[1:]))
    whole = np.concatenate([ids, filler])
    return f"nrlre1:int16:{'x'.join(map(str, whole.shape))}:{code(whole, 'int16')}"


def sglang(ids: np.ndarray, dtype: str = "int32", **more: Any) -> dict[str, Any]:
    declared = {} if dtype == "int32" else {"routed_experts_dtype": dtype}
    return {"meta_info": {"routed_experts": code(ids, dtype)} | declared | more}


def megatron(ids: np.ndarray) -> bytes:
    """A micro-batch of B sequences, flattened from `[S, B]`."""
    flat = ids.transpose(1, 0, 2, 3).reshape(-1, *ids.shape[2:])
    common = {"step": 0, "block": "decoder", "num_tokens": len(flat), "topk": ids.shape[-1]}
    return lines(
        common | {"layer": n, "top_indices": flat[:, n].tolist()} for n in range(ids.shape[2])
    )


def choices(values: Any) -> dict[str, Any]:
    return {"choices": [{"index": n, "routed_experts": v} for n, v in enumerate(values)]}


def batch_line(number: int, ids: np.ndarray) -> dict[str, Any]:
    body = {"status_code": 200, "body": choices([ids.tolist()])}
    return {"id": f"r{number}", "custom_id": str(number), "response": body, "error": None}


def parquet(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


SIGNED: dict[str, Callable[[np.ndarray], bytes]] = {
    "own.npz": lambda ids: npz(routed_experts=ids),
    "plain.npy": npy,
    "own.safetensors": lambda ids: save({"routed_experts": torch.from_numpy(ids)}),
    "lists.json": lambda ids: text(choices(row.tolist() for row in ids)),
    "npy.json": lambda ids: text(choices(base64.b64encode(npy(row)).decode() for row in ids)),
    "sglang.json": lambda ids: text([sglang(row) for row in ids]),
    "object.json": lambda ids: text(choices(payload(row) for row in ids)),
    "nemo.json": lambda ids: text(
        {"choices": [{"message": {"routed_experts": nemo(row)}} for row in ids]}
    ),
    "gym.json": lambda ids: text({"output": [{"routed_experts": nemo(row)} for row in ids]}),
    "lines.jsonl": lambda ids: lines(choices([row.tolist()]) for row in ids),
    "batch.jsonl": lambda ids: lines(batch_line(n, row) for n, row in enumerate(ids)),
    "lists.parquet": lambda ids: parquet([{"routed_experts": row.tolist()} for row in ids]),
    "object.parquet": lambda ids: parquet(
        [
            {"routed_experts": {"data": row.astype("<i2").tobytes(), "shape": list(row.shape)}}
            for row in ids
        ]
    ),
    "megatron.jsonl": megatron,
}
"""Formats that can hold -1."""
UNSIGNED: dict[str, Callable[[np.ndarray], bytes]] = {
    "uint8.npz": lambda ids: npz(routed_experts=ids.astype(np.uint8)),
    "uint16.npy": lambda ids: npy(ids.astype(np.uint16)),
    "sglang-uint8.json": lambda ids: text([sglang(row, "uint8") for row in ids]),
    "sglang-uint16.jsonl": lambda ids: lines(sglang(row, "uint16") for row in ids),
    "object-uint8.json": lambda ids: text(choices(payload(row, "uint8") for row in ids)),
    "object-uint16.jsonl": lambda ids: lines(
        choices([payload(row, "uint16", dtype="uint16")]) for row in ids
    ),
}
FORMATS = SIGNED | UNSIGNED
READ = {"num_layers": L, "top_k": K}


def written(folder: Path, name: str, ids: np.ndarray) -> Path:
    """A file of one of the formats."""
    path = folder / name
    path.write_bytes(FORMATS[name](ids))
    return path
