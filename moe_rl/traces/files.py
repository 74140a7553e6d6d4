"""Traces: recorded routes read from files, whoever wrote them.

    read_trace("rollout.npz")                                  ours, or an array `routed_experts`
    read_trace("rollout.npz", array="routes")                  an array of another name
    read_trace("response.json")                                vLLM's OpenAI-style response
    read_trace("responses.jsonl")                              one a line, also of vllm run-batch
    read_trace("responses.parquet")                            one a row
    read_trace("response.json", num_layers=48, top_k=8)        SGLang's response
    read_trace("trace_dir/router_trace_rank0.jsonl")           Megatron-LM's router trace
    read_trace("trace_dir")                                    all its ranks, as further rows

One reader a layout, chosen by the suffix, and for JSONL by what its lines hold. Nothing is
unpickled.
"""

import io
import json
import math
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.torch import save_file
from torch import Tensor

from moe_rl.routing.routed_experts import NO_RECORD
from moe_rl.runtime.extras import import_extra
from moe_rl.traces.foreign import KEY, from_vllm, stack_rows
from moe_rl.traces.megatron import MEGATRON_FILES, read_megatron
from moe_rl.traces.responses import Responses, read_responses

# What json, numpy and safetensors raise on a damaged file, and our readers on a wrong content.
BAD_FILE = (ValueError, EOFError, zipfile.BadZipFile, zlib.error, SafetensorError)


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Routes read from a file."""

    routed_experts: Tensor
    """int16 `[B, S, L, K]`, -1 where there is no record."""
    source: str
    """The system that writes files of this layout."""
    response: Tensor | None = None
    """bool `[B, S]`: where response tokens are predicted; None where the file does not say."""
    tokens: Tensor | None = None
    """int64 `[B, S]`, the tokens that were routed, -1 behind them; None likewise."""
    logprobs: Tensor | None = None
    """float32 `[B, S]`, nats: the engine's of the response token that is predicted there, NaN where
    it said none; None likewise."""
    notes: tuple[str, ...] = ()
    """What was left out or filled in while reading."""


def read_trace(
    path: Path | str,
    *,
    num_layers: int | None = None,
    top_k: int | None = None,
    batch_size: int = 1,
    array: str = KEY,
) -> Trace:
    """Read a trace by its suffix: .npz, .npy, .safetensors, .json, .jsonl, .parquet, or a folder.

    Args:
        num_layers: decoder layers of the model, dense ones included; only SGLang needs it.
        top_k: K, experts per token; only SGLang needs it.
        batch_size: sequences in one micro-batch of a Megatron-LM trace, which flattens `[S, B]`.
        array: name of the array, field or column that holds the routes.

    Raises:
        ValueError: unknown suffix, damaged file, or no routes `[B, S, L, K]` in it; the message
            begins with the path.
        OSError: the file cannot be read.
    """
    path = Path(path)
    # Numbers differ in width, and rank 10 comes after rank 9.
    shards = sorted(path.glob(MEGATRON_FILES), key=lambda file: (len(file.name), file.name))
    sizes = {"num_layers": num_layers, "top_k": top_k}
    try:
        if path.suffix in (".npz", ".npy"):
            loaded = np.load(path)
            named = {array: loaded} if isinstance(loaded, np.ndarray) else loaded
            return _from_arrays(named, array)
        if path.suffix == ".safetensors":
            return _from_arrays(load_file(path), array)
        if path.suffix == ".json":
            content = [json.loads(path.read_bytes())]
            return _from_responses(read_responses(content, key=array, **sizes))
        if path.suffix == ".parquet":
            return _from_responses(read_responses(_rows(path), key=array, **sizes))
        if path.suffix == ".jsonl" and not _is_megatron(path):
            return _from_responses(read_responses(read_lines(path), key=array, **sizes))
        if path.suffix == ".jsonl" or shards:
            rows, notes = read_megatron(shards or [path], batch_size)
            return Trace(routed_experts=stack_rows(rows), source="Megatron-LM", notes=notes)
        raise ValueError(
            "a trace is a file .npz, .npy, .safetensors, .json or .jsonl (vLLM, SGLang), .parquet "
            f"(one response a row) or .jsonl (Megatron-LM), or a folder with {MEGATRON_FILES}"
        )
    except BAD_FILE as error:
        raise ValueError(f"{path}: {what_is_wrong(error)}") from error


def what_is_wrong(error: Exception) -> str:
    """One of `BAD_FILE` in words, and what to do where its own words say less or advise pickle."""
    said = str(error)
    if "pickled (object) data" in said or "Object arrays" in said:
        return "no arrays of numbers, or no numpy file; write them with numpy.savez"
    if isinstance(error, json.JSONDecodeError):
        hint = "; name a file of one response a line .jsonl" if "Extra data" in said else ""
        return f"not JSON: {said}{hint}"
    return said


def write_trace(path: Path | str, routed_experts: Tensor) -> None:
    """Write a record as safetensors, to be read by `read_trace`."""
    save_file({KEY: routed_experts.detach().cpu().contiguous()}, str(path))


def same_tokens(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two records of the same tokens, cut to equal length: one may lack the last token's row.

    Raises:
        ValueError: they differ in B, L or K, or in S by more than one.
    """
    length = min(a.shape[1], b.shape[1])
    if abs(a.shape[1] - b.shape[1]) > 1 or (a.shape[0], *a.shape[2:]) != (b.shape[0], *b.shape[2:]):
        raise ValueError(
            f"traces: [B, S, L, K] is {list(a.shape)} and {list(b.shape)}. Compare two records of "
            "the same tokens by models of the same layers."
        )
    return a[:, :length], b[:, :length]


def _from_arrays(arrays: Mapping[str, np.ndarray], name: str) -> Trace:
    """The array `name`, `[S, L, K]` or `[B, S, L, K]`; vLLM 0.21 has the prompt's routes beside."""
    if name not in arrays:
        raise ValueError(
            f"holds the arrays {sorted(arrays)[:8]} and no {name!r}; name the one with the routes "
            "(--array NAME on the command line)"
        )
    routes, source = arrays[name], "numpy"
    if f"prompt_{name}" in arrays:
        routes, source = from_vllm(routes, arrays[f"prompt_{name}"]), "vLLM 0.21"
    rows = list(routes) if routes.ndim == 4 else [routes]
    return Trace(routed_experts=stack_rows(rows), source=source)


def _from_responses(found: Responses) -> Trace:
    """The record of some completions, with what their responses say about their tokens."""
    record = stack_rows(found.rows)
    # The last token, which is never fed, is predicted at the last row: it has a place, and -1.
    longest = max((length for length in found.lengths if length is not None), default=0)
    lacking = max(0, longest - record.shape[1])
    record = torch.nn.functional.pad(record, (0, 0, 0, 0, 0, lacking), value=NO_RECORD)
    shape = record.shape[:2]
    response = tokens = logprobs = None
    said = [*zip(found.prompts, found.tokens, found.recorded, strict=True)]
    if all(prompt is not None for prompt, _, recorded in said if recorded):
        # The last token of a sequence predicts none; where nothing tells the length, rows do.
        ends = [
            len(row) if length is None else length - 1
            for row, length in zip(found.rows, found.lengths, strict=True)
        ]
        # What failed, and says nothing, has no prompt and no response.
        first = torch.tensor([shape[1] if p is None else p - 1 for p in found.prompts])[:, None]
        places = torch.arange(shape[1])
        response = (places >= first) & (places < torch.tensor(ends)[:, None])
        if any(found.logprobs):
            logprobs = torch.full(shape, math.nan)
            for row, prompt, values in zip(logprobs, found.prompts, found.logprobs, strict=True):
                if prompt and values:
                    places = row[prompt - 1 :][: len(values)]
                    places.copy_(torch.tensor(values)[: len(places)])
    if all(tokens is not None for _, tokens, recorded in said if recorded):
        tokens = torch.full(shape, -1)
        for row, ids in zip(tokens, found.tokens, strict=True):
            if ids:
                row[: len(ids)] = torch.tensor(ids)[: len(row)]
    return Trace(
        routed_experts=record,
        source=found.source,
        response=response,
        tokens=tokens,
        logprobs=logprobs,
        notes=found.notes,
    )


def _is_megatron(path: Path) -> bool:
    """Whether a JSONL file is a router trace of Megatron-LM."""
    with path.open(encoding="utf-8", errors="replace") as file:
        head = file.read(1 << 16)
    if '"router_replay_forward_verify"' in head or '"valid_sha256"' in head:
        raise ValueError(
            "a trace of NeMo-RL (NRL_R3_TRACE), which holds digests and previews of routes and not "
            "the routes; save the responses of its rollout instead"
        )
    return '"top_indices"' in head


def read_lines(path: Path) -> Iterator[Any]:
    """The objects of a JSONL file.

    Raises:
        ValueError: a line is not JSON; names its number.
    """
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"line {number}: not JSON: {error}") from error


def _rows(path: Path) -> Sequence[Any]:
    """The rows of a parquet file."""
    parquet: Any = import_extra("pyarrow.parquet", extra="data", option="a .parquet trace")
    content = io.BytesIO(path.read_bytes())
    try:
        rows: list[Any] = parquet.read_table(content).to_pylist()
    except OSError as error:  # what it finds damaged in the bytes
        raise ValueError(str(error)) from error
    return rows
