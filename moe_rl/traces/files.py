"""Traces: recorded routes read from files, whoever wrote them.

    read_trace("rollout.npz")                                  ours, or an array `routed_experts`
    read_trace("response.json")                                vLLM's OpenAI-style response
    read_trace("response.json", num_layers=48, top_k=8)        SGLang's response
    read_trace("trace_dir/router_trace_rank0.jsonl")           Megatron-LM's router trace
    read_trace("trace_dir")                                    all its ranks, as further rows

One reader a layout, chosen by the suffix. Nothing is unpickled.
"""

import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.torch import save_file
from torch import Tensor

from moe_rl.traces.foreign import KEY, PROMPT_KEY, from_vllm, stack_rows
from moe_rl.traces.megatron import MEGATRON_FILES, read_megatron
from moe_rl.traces.responses import read_responses

# What json, numpy and safetensors raise on a damaged file, and our readers on a wrong content.
_BAD_FILE = (ValueError, EOFError, zipfile.BadZipFile, zlib.error, SafetensorError)


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Routes read from a file."""

    routed_experts: Tensor
    """int16 `[B, S, L, K]`, -1 where there is no record."""
    source: str
    """The system that writes files of this layout."""


def read_trace(
    path: Path | str,
    *,
    num_layers: int | None = None,
    top_k: int | None = None,
    batch_size: int = 1,
) -> Trace:
    """Read a trace by its suffix: .npz, .npy, .safetensors, .json, .jsonl, or a folder of .jsonl.

    Args:
        num_layers: decoder layers of the model, dense ones included; only SGLang needs it.
        top_k: K, experts per token; only SGLang needs it.
        batch_size: sequences in one micro-batch of a Megatron-LM trace, which flattens `[S, B]`.

    Raises:
        ValueError: unknown suffix, damaged file, or no routes `[B, S, L, K]` in it; the message
            begins with the path.
        OSError: the file cannot be read.
    """
    path = Path(path)
    # Numbers differ in width, and rank 10 comes after rank 9.
    shards = sorted(path.glob(MEGATRON_FILES), key=lambda file: (len(file.name), file.name))
    try:
        if path.suffix in (".npz", ".npy"):
            loaded = np.load(path)
            return _from_arrays({KEY: loaded} if isinstance(loaded, np.ndarray) else loaded)
        if path.suffix == ".safetensors":
            return _from_arrays(load_file(path))
        if path.suffix == ".json":
            rows, source = read_responses(json.loads(path.read_bytes()), num_layers, top_k)
            return Trace(routed_experts=stack_rows(rows), source=source)
        if path.suffix == ".jsonl" or shards:
            rows = read_megatron(shards or [path], batch_size)
            return Trace(routed_experts=stack_rows(rows), source="Megatron-LM")
        raise ValueError(
            "a trace is a file .npz, .npy, .safetensors, .json (vLLM, SGLang) or .jsonl "
            f"(Megatron-LM), or a folder with {MEGATRON_FILES}"
        )
    except _BAD_FILE as error:
        what = "not JSON: " if isinstance(error, json.JSONDecodeError) else ""
        raise ValueError(f"{path}: {what}{error}") from error


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


def _from_arrays(arrays: Mapping[str, np.ndarray]) -> Trace:
    """`routed_experts` `[S, L, K]` or `[B, S, L, K]`; vLLM 0.21 has the prompt's routes beside."""
    if KEY not in arrays:
        raise ValueError(f"holds {sorted(arrays)[:8]}; expected an array {KEY!r}")
    routes, source = arrays[KEY], "numpy"
    if PROMPT_KEY in arrays:
        routes, source = from_vllm(routes, arrays[PROMPT_KEY]), "vLLM 0.21"
    rows = list(routes) if routes.ndim == 4 else [routes]
    return Trace(routed_experts=stack_rows(rows), source=source)
