"""Traces: Megatron-LM's router trace (megatron/core, `router_trace`), one JSONL file a rank.

A line is one MoE layer of one forward pass:

    {"step": 0, "block": "decoder", "layer": 3, "num_tokens": N, "topk": K, "top_indices": [[...]]}

A step may have several passes; the n-th line of a layer in a step belongs to its n-th pass. Steps
follow each other and are joined along the tokens. Lines of "mtp" blocks are left out.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

MEGATRON_FILES = "router_trace_rank*.jsonl"


def read_megatron(files: Sequence[Path], batch_size: int) -> list[np.ndarray]:
    """Rows `[S, L, K]` of the files of all ranks, in the order of `files`.

    A pass flattens the tokens of a micro-batch of `batch_size` sequences from `[S, B]`. With 1 a
    file is one row; with more, every sequence of every pass is a row.

    Raises:
        ValueError: a line that is none of a router trace, lines cut off or out of order, files of
            different layers, or a pass that `batch_size` does not divide.
    """
    rows: list[np.ndarray] = []
    layers_of: dict[str, list[int]] = {}
    for file in files:
        layers_of[file.name], passes = _passes(file)
        if batch_size > 1:
            bad = next((len(ids) for ids in passes if len(ids) % batch_size), None)
            if bad is not None:
                raise ValueError(
                    f"batch_size={batch_size}: does not divide a pass of {bad} tokens; give the "
                    "sequences of a micro-batch"
                )
            rows += [ids[b::batch_size] for ids in passes for b in range(batch_size)]
        elif passes:
            rows.append(np.concatenate(passes))
    if len(set(map(tuple, layers_of.values()))) > 1:
        raise ValueError(
            f"its files trace different layers, {layers_of}: stages of a pipeline, whose files do "
            "not say which rows belong together; read them one by one"
        )
    return rows


def _passes(file: Path) -> tuple[list[int], list[np.ndarray]]:
    """The layers, and the ids `[N, L, K]` of each pass, in the order of the file."""
    passes: list[np.ndarray] = []
    layers: list[int] = []
    for step, by_layer in _steps(file).items():
        layers = layers or sorted(by_layer)
        sizes = [[ids.shape for ids in by_layer[layer]] for layer in layers if layer in by_layer]
        if sorted(by_layer) != layers or any(size != sizes[0] for size in sizes):
            lines = {layer: len(by_layer[layer]) for layer in sorted(by_layer)}
            raise ValueError(
                f"step {step} of {file.name}: lines by layer {lines}; expected the layers {layers} "
                "with as many lines and tokens each: the trace is cut off or mixes files"
            )
        passes += [
            np.stack(ids, axis=1) for ids in zip(*(by_layer[n] for n in layers), strict=True)
        ]
    return layers, passes


def _steps(file: Path) -> dict[int, dict[int, list[np.ndarray]]]:
    """By step and layer, the ids `[N, K]` of each pass of the decoder."""
    steps: Any = defaultdict(lambda: defaultdict(list))
    last = 0
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                step, layer = record.get("step") or 0, record["layer"]
                if record.get("block", "decoder") != "decoder":
                    continue
                ids = np.array(record["top_indices"])
                ids = ids.reshape(record["num_tokens"], record["topk"])
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"line {number}: not of a router trace ({error!r})") from error
            # The n-th line of a layer is the n-th pass: a second run's lines would pair wrongly.
            if step < last:
                raise ValueError(f"line {number}: step {step} after step {last}: out of order")
            steps[step][layer].append(ids)
            last = step
    return dict(steps)
