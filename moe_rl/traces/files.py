"""Traces: recorded routes from files, whoever wrote them.

    read_trace("rollout.npz")                                  ours, or an array `routed_experts`
    read_trace("response.json")                                vLLM's OpenAI-style response
    read_trace("response.json", num_layers=48, top_k=8)        SGLang's
    read_trace("trace_dir/router_trace_rank0.jsonl")           Megatron-LM's router trace
    read_trace("trace_dir")                                    of all its ranks, as further rows

Nothing is unpickled, no header is evaluated, and nothing much larger than its file is allocated.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe_rl.runtime.json_text import parse_json
from moe_rl.traces.arrays import npy_array, npz_arrays
from moe_rl.traces.foreign import decode_base64, from_sglang, from_vllm, npy_bytes, stack_rows
from moe_rl.traces.limits import check_is_file, check_size

KEY = "routed_experts"
PROMPT_KEY = "prompt_routed_experts"
MEGATRON_FILES = "router_trace_rank*.jsonl"
_INTEGERS = {f"{sign}{bits}" for sign in "IU" for bits in (8, 16, 32, 64)}


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Routes read from a file."""

    routed_experts: Tensor
    """int16 `[B, S, L, K]`, -1 where there is no record."""
    source: str
    """Who writes files of this layout."""


def read_trace(
    path: Path | str,
    *,
    num_layers: int | None = None,
    top_k: int | None = None,
    batch_size: int = 1,
) -> Trace:
    """Read a trace by the ending of its name: npz, npy, safetensors, json, jsonl, or a folder.

    Args:
        path: the file, or the folder of a Megatron-LM trace.
        num_layers: all decoder layers; needed by SGLang's flat bytes only.
        top_k: K; the same.
        batch_size: sequences in one micro-batch of a Megatron-LM trace, which flattens `[S, B]`.

    Raises:
        ValueError: another ending, no routes inside, or routes that make no `[B, S, L, K]`; the
            message begins with the path.
        OSError: the file cannot be read.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _megatron_folder(path, batch_size)
        check_is_file(path)
        if path.suffix == ".npz":
            return _npz(path.read_bytes())
        if path.suffix == ".npy":
            return Trace(routed_experts=_four_axes(npy_array(path.read_bytes())), source="numpy")
        if path.suffix == ".safetensors":
            return Trace(routed_experts=_four_axes(_safetensors(path)), source="moe-rl")
        if path.suffix == ".json":
            return _response(path.read_bytes(), num_layers, top_k)
        if path.suffix == ".jsonl":
            _, rows = _megatron(_lines(path), batch_size)
            return Trace(routed_experts=stack_rows(rows), source="Megatron-LM")
        raise ValueError(
            "a trace is a file .npz, .npy, .safetensors, .json (vLLM, SGLang) or .jsonl "
            "(Megatron-LM), or the folder of a Megatron-LM trace."
        )
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{path}: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: nested too deep.") from error


def write_trace(path: Path | str, routed_experts: Tensor) -> None:
    """Write a record as safetensors, to be read by `read_trace`."""
    save_file({KEY: routed_experts.detach().cpu().contiguous()}, str(path))


def _four_axes(values: np.ndarray) -> Tensor:
    if values.ndim == 3:
        values = values[None]
    # An empty array may have more rows than memory has room for views of them.
    if values.ndim != 4 or values.size == 0:
        raise ValueError(f"{KEY}: shape {list(values.shape)}, not [S, L, K] or [B, S, L, K].")
    return stack_rows(list(values))


def _npz(raw: bytes) -> Trace:
    arrays, names = npz_arrays(raw, (KEY, PROMPT_KEY))
    if KEY not in arrays:
        raise ValueError(f"holds {names}, and no array {KEY!r}.")
    if PROMPT_KEY not in arrays:
        return Trace(routed_experts=_four_axes(arrays[KEY]), source="numpy")
    row = from_vllm(arrays[KEY], arrays[PROMPT_KEY])
    return Trace(routed_experts=_four_axes(row), source="vLLM 0.21")


def _safetensors(path: Path) -> np.ndarray:
    with safe_open(path, framework="numpy") as opened:
        names = sorted(opened.keys())
        if KEY not in names:
            raise ValueError(f"holds {names[:8]}, and no tensor {KEY!r}.")
        kind = opened.get_slice(KEY).get_dtype()
        if kind not in _INTEGERS:
            raise ValueError(f"{KEY}: {kind}, not integer ids.")
        values: np.ndarray = opened.get_tensor(KEY)
    return values


def _response(raw: bytes, num_layers: int | None, top_k: int | None) -> Trace:
    try:
        content = parse_json(raw.decode("utf-8"), unique_keys=False)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error}).") from error
    found = list(_completions(content))
    if not found:
        raise ValueError(f"no response in it has {KEY!r}. Was the server started with the option?")
    rows, source, total = [], "vLLM", 0
    shared, shared_routes = None, np.empty(0)  # the completions of a prompt follow each other
    for generated, prompt in found:
        row, kind = _routes(generated, num_layers, top_k)
        source = kind or source
        if prompt is not None:
            if prompt is not shared:
                shared, shared_routes = prompt, _routes(prompt, num_layers, top_k)[0]
            row, source = from_vllm(row, shared_routes), "vLLM 0.21"
        rows.append(row)
        total += row.nbytes  # every completion repeats its prompt
        check_size(total, len(raw), f"{len(rows)} completions with their prompt's routes")
    return Trace(routed_experts=stack_rows(rows), source=source)


def _completions(content: Any) -> Iterator[tuple[Any, Any]]:
    """(routes, routes of the prompt or None) of every completion in responses."""
    if isinstance(content, list):
        for item in content:
            yield from _completions(item)
    elif isinstance(content, dict):
        prompt = content.get(PROMPT_KEY)
        choices = content.get("choices", content.get("outputs"))
        places = [
            content,
            content.get("meta_info"),
            *(choices if isinstance(choices, list) else []),
        ]
        found = [p for p in places if isinstance(p, dict) and p.get(KEY) is not None]
        extension = content.get("sglext")  # where SGLang repeats what meta_info says
        if not found and isinstance(extension, dict) and extension.get(KEY) is not None:
            found = [extension]
        for place in found:
            yield place[KEY], place.get(PROMPT_KEY, prompt)


def _routes(value: Any, num_layers: int | None, top_k: int | None) -> tuple[np.ndarray, str]:
    """An array from nested lists, from base64 of an npy file, or from SGLang's flat bytes."""
    if isinstance(value, str):
        array = npy_bytes(decode_base64(value))
        if array is not None:
            return array, ""
        if num_layers is None or top_k is None:
            raise ValueError(
                f"{KEY}: flat bytes (SGLang) do not say their shape. Pass num_layers (all decoder "
                "layers of the model) and top_k (--num-layers and --top-k on the command line)."
            )
        return from_sglang(value, num_layers=num_layers, top_k=top_k), "SGLang"
    try:
        return _integers(value), ""
    except ValueError as error:
        raise ValueError(f"{KEY}: {error}") from error


def _integers(value: Any) -> np.ndarray:
    """Nested lists of whole numbers as an array.

    Checked before numpy sees them: it would give a thousand texts the room of the longest.
    """
    level, kinds = [value], {type(value)}
    while kinds == {list}:
        level = list(chain.from_iterable(level))
        kinds = set(map(type, level))
    if kinds != {int}:
        if list in kinds:
            raise ValueError("lists of uneven depth make no [S, L, K].")
        names = ", ".join(sorted(kind.__name__ for kind in kinds)) or "no"
        raise ValueError(f"{names} values, not integer ids.")
    try:
        array = np.array(value)
    except ValueError as error:
        raise ValueError("lists of uneven length make no [S, L, K].") from error
    if array.dtype.kind not in "iu":
        raise ValueError(f"{array.dtype} values, not integer ids.")
    return array


def _lines(path: Path) -> list[str]:
    """Lines as JSON ends them: other line ends of Unicode may stand inside a text."""
    return path.read_bytes().decode("utf-8").split("\n")


def _megatron_folder(folder: Path, batch_size: int) -> Trace:
    files = sorted(folder.glob(MEGATRON_FILES), key=_rank)
    if not files:
        raise ValueError(f"a folder without {MEGATRON_FILES}.")
    rows: list[np.ndarray] = []
    known: list[int] = []
    for file in files:
        check_is_file(file)
        layers, found = _megatron(_lines(file), batch_size)
        if known and layers != known:
            raise ValueError(
                f"{file.name} traces the layers {layers}, {files[0].name} {known}: stages of a "
                "pipeline, whose files do not say which rows belong together. Read them one by one."
            )
        known = layers
        rows += found
    return Trace(routed_experts=stack_rows(rows), source="Megatron-LM")


def _rank(file: Path) -> tuple[int, str]:
    digits = "".join(filter(str.isdigit, file.stem))
    return int(digits or 0), file.name


_Layers = dict[int, list[np.ndarray]]
"""Ids `[tokens, K]` of each pass, by layer."""


def _megatron(lines: list[str], batch_size: int) -> tuple[list[int], list[np.ndarray]]:
    """Layers and rows `[S, L, K]` of Megatron-LM's router trace (megatron/core, `router_trace`).

    A line is one layer of one pass: {"step", "block", "layer", "num_tokens", "topk",
    "top_indices"}. Steps follow each other, and the passes of a layer within a step; "mtp" blocks
    are left out.
    """
    steps: dict[int, _Layers] = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            _add_line(steps, _json_line(line, number), number)
    if not steps:
        raise ValueError("no line traces a layer of the decoder.")
    layers = sorted(next(iter(steps.values())))
    passes = []
    for step, parts in steps.items():
        if sorted(parts) != layers:
            raise ValueError(
                f"step {step} traces the layers {sorted(parts)}, the first step {layers}: the "
                "trace is cut off or mixes files."
            )
        _check_passes(parts, step)
        passes += [
            np.stack([parts[layer][i] for layer in layers], 1) for i in range(len(parts[layers[0]]))
        ]
    if batch_size == 1:
        return layers, [np.concatenate(passes)]
    return layers, [row for part in passes for row in _split_batch(part, batch_size)]


def _check_passes(layers: _Layers, step: int) -> None:
    counts = {layer: [part.shape for part in parts] for layer, parts in layers.items()}
    first = next(iter(counts.values()))
    for layer, shapes in counts.items():
        if shapes != first:
            raise ValueError(
                f"step {step}: layer {layer} has {len(shapes)} passes of other sizes than layer "
                f"{next(iter(counts))} ({len(first)} passes): the trace is cut off or mixes files."
            )


def _split_batch(tokens: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    if batch_size < 1 or tokens.shape[0] % batch_size:
        raise ValueError(
            f"batch_size: {batch_size} sequences do not divide a pass of {tokens.shape[0]} tokens."
        )
    by_position = tokens.reshape(-1, batch_size, *tokens.shape[1:])  # Megatron's [S, B]
    for b in range(batch_size):
        yield by_position[:, b]


def _json_line(line: str, number: int) -> dict[str, Any]:
    try:
        record = parse_json(line, unique_keys=False)
    except ValueError as error:
        raise ValueError(f"line {number}: not JSON ({error}).") from error
    if not isinstance(record, dict):
        raise ValueError(f"line {number}: not an object.")
    return record


def _add_line(steps: dict[int, _Layers], record: dict[str, Any], number: int) -> None:
    if record.get("block", "decoder") != "decoder":
        return
    layer, indices = record.get("layer"), record.get("top_indices")
    if not isinstance(layer, int) or not isinstance(indices, list):
        raise ValueError(f"line {number}: no 'layer' and 'top_indices' of a router trace.")
    try:
        ids = _integers(indices)
    except ValueError as error:
        raise ValueError(f"line {number}: 'top_indices': {error}") from error
    expected = (record.get("num_tokens"), record.get("topk"))
    if ids.ndim != 2 or ids.shape != expected:
        raise ValueError(
            f"line {number}: 'top_indices' is {ids.dtype} {list(ids.shape)}, the line says "
            f"num_tokens, topk = {list(expected)!r:.60}."
        )
    step, last = record.get("step"), next(reversed(steps), None)
    step = 0 if step is None else step
    if not isinstance(step, int):
        raise ValueError(f"line {number}: step {step!r:.40} is no whole number.")
    if last is not None and step < last:
        raise ValueError(
            f"line {number}: step {step!r:.40} after step {last}: the lines are out of order."
        )
    steps.setdefault(step, {}).setdefault(layer, []).append(ids)


def same_tokens(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two records of the same tokens with equal positions: a last row that one lacks is cut off.

    Raises:
        ValueError: they differ otherwise.
    """
    length = min(a.shape[1], b.shape[1])
    if abs(a.shape[1] - b.shape[1]) > 1 or (a.shape[0], *a.shape[2:]) != (b.shape[0], *b.shape[2:]):
        raise ValueError(
            f"traces: [B, S, L, K] is {list(a.shape)} and {list(b.shape)}. Compare two records of "
            "the same tokens by models of the same layers."
        )
    return a[:, :length], b[:, :length]
