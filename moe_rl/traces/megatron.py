"""Traces: Megatron-LM's router trace (megatron/core, `router_trace`), one JSONL file a rank.

A line is one MoE layer of one forward pass:

    {"step": 0, "block": "decoder", "layer": 3, "num_tokens": N, "topk": K, "top_indices": [[...]]}

A step may have several passes; the n-th line of a layer in a step belongs to its n-th pass. Steps
follow each other and are joined along the tokens. Lines of "mtp" blocks are left out.

The tracer is a forward hook, so activation recomputation writes the lines of its layers once more:
they hold the ids of a line before them, and are left out and counted. A pass of fewer than four
tokens is never taken for a repeat: it may look like another by chance.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

MEGATRON_FILES = "router_trace_rank*.jsonl"


_FEWEST_TOKENS = 4
"""Of a pass that may be taken for a repeat."""


def read_megatron(
    files: Sequence[Path], batch_size: int
) -> tuple[list[np.ndarray], tuple[str, ...]]:
    """Rows `[S, L, K]` of the files of all ranks, in the order of `files`, and what was left out.

    A pass flattens the tokens of a micro-batch of `batch_size` sequences from `[S, B]`. With 1 a
    file is one row; with more, every sequence of every pass is a row.

    Raises:
        ValueError: a line that is none of a router trace, lines cut off or out of order, files of
            different layers, or a pass that `batch_size` does not divide.
    """
    rows: list[np.ndarray] = []
    layers_of: dict[str, list[int]] = {}
    repeats = 0
    for file in files:
        layers_of[file.name], passes, repeated = _passes(file)
        repeats += repeated
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
    note = (
        f"{repeats} lines hold the ids of a line before them, as activation recomputation writes "
        "its layers once more: left out"
    )
    return rows, (note,) if repeats else ()


def _passes(file: Path) -> tuple[list[int], list[np.ndarray], int]:
    """The layers, the ids `[N, L, K]` of each pass in the order of the file, and lines left out."""
    passes: list[np.ndarray] = []
    layers: list[int] = []
    repeats = 0
    for step, lines in _steps(file).items():
        by_layer = _without_repeats(lines)
        repeats += sum(map(len, lines.values())) - sum(map(len, by_layer.values()))
        layers = layers or sorted(by_layer)
        sizes = [[ids.shape for ids in by_layer[layer]] for layer in layers if layer in by_layer]
        if sorted(by_layer) != layers or any(size != sizes[0] for size in sizes):
            counts = {layer: len(by_layer[layer]) for layer in sorted(by_layer)}
            raise ValueError(
                f"step {step} of {file.name}: lines by layer {counts}; expected the layers "
                f"{layers} with as many lines and tokens each: the trace is cut off or mixes files"
            )
        passes += [
            np.stack(ids, axis=1) for ids in zip(*(by_layer[n] for n in layers), strict=True)
        ]
    return layers, passes, repeats


def _without_repeats(by_layer: dict[int, list[np.ndarray]]) -> dict[int, list[np.ndarray]]:
    """The lines of a step without those that recomputation has written; `[N, K]` each.

    Of a pass that was recomputed in every layer all lines must be repeats. Where some layers have
    more lines than others, those alone were recomputed.
    """
    repeats = {layer: _repeats(lines) for layer, lines in by_layer.items()}
    if len({len(lines) for lines in by_layer.values()}) == 1:
        whole = set.intersection(*repeats.values())
        repeats = dict.fromkeys(by_layer, whole)
    kept = {
        layer: [ids for n, ids in enumerate(lines) if n not in repeats[layer]]
        for layer, lines in by_layer.items()
    }
    # Where the counts do not come out even there is another reason, and the lines stay as they are.
    return kept if len({len(lines) for lines in kept.values()}) == 1 else by_layer


def _repeats(lines: Sequence[np.ndarray]) -> set[int]:
    """Numbers of the lines that hold the ids of an earlier line, each of which has one repeat."""
    waiting: Counter[bytes] = Counter()
    found = set()
    for number, ids in enumerate(lines):
        content = ids.tobytes()
        if waiting[content]:
            waiting[content] -= 1
            found.add(number)
        elif len(ids) >= _FEWEST_TOKENS:
            waiting[content] += 1
    return found


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
