"""Traces: how one array of routes is written, from nested lists to bytes with a declared type.

| value of `routed_experts`                            | who writes it so                          |
|------------------------------------------------------|-------------------------------------------|
| nested lists, an array, a tensor                     | vLLM, Hugging Face datasets               |
| base64 of an npy file                                | vLLM 0.22 and later                       |
| base64 of flat bytes, and beside it perhaps          | SGLang: int32 unless declared             |
|   `routed_experts_dtype`, `routed_experts_start_len` |                                           |
| {"data": base64 or bytes, "shape": [S, L, K],        | prime-rl (uint8 or uint16), LightLLM,     |
|   "dtype": "uint16", "start": 0}                     |   routers in front of vLLM                |
| "nrlre1:int16:SxLxK:" and base64                     | NeMo-RL; the last row is 0..K-1: no route |
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from moe_rl.routing.routed_experts import NO_RECORD

_DTYPES = {
    name: np.dtype(name).newbyteorder("<")
    for name in ("uint8", "int8", "uint16", "int16", "int32", "int64")
}
# An object without a dtype: prime-rl's first payloads were uint8, LightLLM's are int32, and a
# narrow id is written without a sign. -1 is a legal id of the signed ones only.
_BY_WIDTH = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}
_NEMO = "nrlre1"
_LONGEST = 1 << 24  # tokens, beyond any context; a start behind it would only fill the memory


def decode_routes(
    value: Any,
    *,
    num_layers: int | None = None,
    top_k: int | None = None,
    dtype: str | None = None,
    start: int | None = None,
) -> tuple[np.ndarray, str]:
    """Ids `[S_i, L, K]` of one sequence, and the kind of system that writes them so.

    Args:
        value: one of the table above.
        num_layers, top_k: decoder layers and experts per token of the model; flat bytes need them.
        dtype: what a field beside `value` declares, for flat bytes; None: int32.
        start: position of the first row, as a field beside `value` says; the positions before it
            become rows of -1.

    Raises:
        ValueError: `value` is none of the table, or its bytes are not of the size they should be.
    """
    source = "vLLM"
    if isinstance(value, Mapping):
        ids, source = _from_object(value), "object"
        start = value.get("start") if start is None else start
    elif isinstance(value, str) and value.startswith(_NEMO):
        ids, source = _from_nemo(value), "NeMo-RL"
    elif isinstance(value, str | bytes):
        raw = value if isinstance(value, bytes) else base64.b64decode(value, validate=True)
        if raw.startswith(np.lib.format.MAGIC_PREFIX):
            ids = np.load(io.BytesIO(raw))
        else:
            ids, source = _from_flat(raw, num_layers, top_k, dtype), "SGLang"
    elif isinstance(value, Tensor):
        ids = value.detach().cpu().numpy()
    else:
        ids = np.asarray(value)
    return _shifted(ids, start), source


def _from_flat(
    raw: bytes, num_layers: int | None, top_k: int | None, dtype: str | None
) -> np.ndarray:
    if num_layers is None or top_k is None:
        raise ValueError(
            "routed_experts: flat bytes (SGLang) do not say their shape; pass num_layers (all "
            "decoder layers of the model) and top_k (--num-layers and --top-k on the command line)"
        )
    kind = _dtype(dtype or "int32")
    row = num_layers * top_k
    if row <= 0 or len(raw) % (row * kind.itemsize):
        fits = [
            n for n in ("uint16", "uint8") if row > 0 and not len(raw) % (row * _DTYPES[n].itemsize)
        ]
        hint = (
            f" (they would be of {' or '.join(fits)}: routed_experts_dtype says so)" if fits else ""
        )
        raise ValueError(
            f"routed_experts: {len(raw)} bytes are no whole number of tokens of {num_layers} "
            f"layers x {top_k} experts x {kind.itemsize} bytes{hint}; give num_layers (all decoder "
            "layers) and top_k of the model that was served"
        )
    return np.frombuffer(raw, dtype=kind).reshape(-1, num_layers, top_k)


def _from_object(value: Mapping[str, Any]) -> np.ndarray:
    """An object with `data`, `shape` and perhaps `dtype`."""
    data, shape = value.get("data"), value.get("shape")
    if data is None or shape is None:
        raise ValueError(
            f"routed_experts: an object with the keys {sorted(value)[:8]}; expected data, shape "
            "[S, L, K] and dtype"
        )
    raw = data if isinstance(data, bytes) else base64.b64decode(data, validate=True)
    return _shaped(raw, [int(size) for size in shape], value.get("dtype"))


def _from_nemo(value: str) -> np.ndarray:
    """A NeMo-RL envelope; its last row stands for the token that was never fed."""
    parts = value.split(":")
    if len(parts) != 4 or parts[0] != _NEMO:
        raise ValueError(
            f"routed_experts: {value[:40]!r} is no envelope of NeMo-RL; expected "
            f"'{_NEMO}:dtype:SxLxK:base64'"
        )
    raw = base64.b64decode(parts[3], validate=True)
    ids = _shaped(raw, [int(size) for size in parts[2].split("x")], parts[1])
    filler = len(ids) > 1 and bool((ids[-1] == np.arange(ids.shape[-1])).all())
    return ids[:-1] if filler else ids


def _shaped(raw: bytes, shape: Sequence[int], dtype: str | None) -> np.ndarray:
    count = math.prod(shape)
    if dtype is None:
        dtype = _BY_WIDTH.get(len(raw) // count if count > 0 else 0, "int32")
    kind = _dtype(dtype)
    if len(raw) != count * kind.itemsize:
        raise ValueError(
            f"routed_experts: {len(raw)} bytes for the shape {list(shape)} of {kind.name}; the "
            "payload is cut off, or its shape or dtype is that of another one"
        )
    return np.frombuffer(raw, dtype=kind).reshape(shape)


def _dtype(name: Any) -> np.dtype[Any]:
    kind = _DTYPES.get(str(name).removeprefix("torch."))
    if kind is None:
        raise ValueError(
            f"routed_experts: declared as {name!r}; expected one of {', '.join(_DTYPES)}"
        )
    return kind


def _shifted(ids: np.ndarray, start: Any) -> np.ndarray:
    """Rows that begin at position `start`, behind rows of -1."""
    if not start or ids.ndim != 3:
        return ids
    if not isinstance(start, int) or not 0 <= start < _LONGEST:
        raise ValueError(f"routed_experts: start={start!r}; expected a position in a sequence")
    before = np.full((start, *ids.shape[1:]), NO_RECORD, dtype=np.int64)
    return np.concatenate([before, ids])
