"""Read a recorded batch: one reader a layout, chosen by the suffix; fields go by their names.

    batch.safetensors, .npz    arrays, of ours or of verl's plugin (`NAMES` in batch.py)
    rank_0.jsonl, a folder     prime-rl's token exports, also a whole step or run of them
    a folder of .safetensors   batches that a run has written: the last one
    train_data_step1.jsonl     NeMo-RL's training data
    response.json, .jsonl      vLLM's and SGLang's responses with routes: traces/

Nothing is unpickled.
"""

import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from moe_rl.config import ConfigError
from moe_rl.recorded.batch import (
    LOGPROBS,
    NAMES,
    RecordedBatch,
    find_names,
    where_predicted,
    without_fills,
)
from moe_rl.traces.files import BAD_FILE, read_lines, read_trace, what_is_wrong

_JSONL = "*.jsonl"
_FLOATS = (*LOGPROBS, "advantages", "mask")


def read_batch(path: Path | str) -> RecordedBatch:
    """The batch in a file, or in a folder of token exports.

    Raises:
        ConfigError: it cannot be read, or holds no batch; begins with the path.
    """
    path = Path(path)
    try:
        if path.is_dir():
            batches = sorted(path.glob("*.safetensors"), key=_in_order)
            if batches:
                last = read_batch(batches[-1])
                note = f"{batches[-1].name}, the last of {len(batches)} batches in the folder"
                return replace(last, notes=(note, *last.notes))
            if (path / "inspection.json").is_file():
                raise ConfigError("an inspection, not a batch; give this folder to --beside")
            files = sorted(path.rglob(_JSONL))
            if not files:
                raise ConfigError(
                    f"no *.safetensors and no {_JSONL} in the folder; give one of batches or of "
                    "token exports, or a file"
                )
            return _from_rows(itertools.chain.from_iterable(map(_lines, files)))
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                source = (file.metadata() or {}).get("source", "safetensors")
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return _from_arrays(arrays, source)
        if path.suffix == ".npz":
            loaded = np.load(path)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                raise ConfigError("one array without a name; save them with numpy.savez")
            # Texts, such as ids of requests, are no tensors.
            named = {name: loaded[name] for name in loaded.files}
            arrays = {n: torch.from_numpy(a) for n, a in named.items() if a.dtype.kind in "biuf"}
            return _from_arrays(arrays, "numpy")
        if path.suffix in (".jsonl", ".json"):
            rows = _lines(path)
            first = next(rows, None)
            if first is None:
                raise ConfigError("no rows; the file is empty")
            fields = find_names(first) if isinstance(first, Mapping) else {}
            if fields.keys() & {*LOGPROBS, "advantages"}:
                return _from_rows(itertools.chain([first], rows))
            return _from_trace(path)
        raise ConfigError(
            "a batch is a file .safetensors or .npz, .jsonl of token exports, .json or .jsonl of "
            "an engine's responses, or a folder of .jsonl files"
        )
    except (OSError, *BAD_FILE) as error:
        said = what_is_wrong(error)
        raise ConfigError(said if said.startswith(str(path)) else f"{path}: {said}") from error


def _in_order(file: Path) -> tuple[int, str]:
    """By the number of the step: 10 comes after 9."""
    digits = re.findall(r"\d+", file.stem)
    return int(digits[-1]) if digits else -1, file.name


def _from_arrays(arrays: Mapping[str, Tensor], source: str) -> RecordedBatch:
    found = {field: arrays[name] for field, name in find_names(arrays).items()}
    if "mask" not in found:
        raise ConfigError(
            f"holds {', '.join(sorted(arrays)) or 'nothing'} and no mask of response tokens; name "
            f"one {' or '.join(NAMES['mask'][:2])}"
        )
    axes = {"mask": (2,), "advantages": (1, 2), "routes": (4,), "trainer_routes": (4,)}
    for field, value in found.items():
        if value.ndim not in axes.get(field, (2,)):
            raise ConfigError(
                f"{field}: shape {list(value.shape)}; record {max(axes.get(field, (2,)))} axes, "
                "sequences first"
            )
    if bool(found["mask"].isnan().any()):
        raise ConfigError("mask: NaN; record 1 at response tokens and 0 elsewhere")
    mask = found["mask"].bool()
    notes = []
    if "old_log_probs" in arrays or "rollout_log_probs" in arrays:
        source = "verl"
    for field in ("routes", "trainer_routes"):
        if field in found:
            found[field], note = _responses_of(found[field], mask, arrays)
            notes += note
    if "advantages" in found and found["advantages"].ndim == 1:
        if len(found["advantages"]) != len(mask):
            raise ConfigError(
                f"advantages: {len(found['advantages'])}, the mask has {len(mask)} sequences"
            )
        found["advantages"] = found["advantages"][:, None].expand(mask.shape)
    fields: dict[str, Any] = found | {"mask": mask}
    return RecordedBatch(source=source, notes=tuple(notes), **fields)


def _responses_of(
    routes: Tensor, mask: Tensor, arrays: Mapping[str, Tensor]
) -> tuple[Tensor, list[str]]:
    """Routes where response tokens are predicted, of routes of whole sequences or of those."""
    length, width = routes.shape[1], mask.shape[1]
    routes = without_fills(routes)
    if length == width:
        return routes, []
    prompts = arrays.get("prompts", arrays.get("prompt_ids"))
    if prompts is not None and prompts.ndim == 2 and length >= prompts.shape[1] + width - 1:
        start = prompts.shape[1] - 1
        return routes[:, start : start + width], []
    if length > width:
        start = length - width - 1
        note = f"routes of {length} positions: the last {width} taken for those of the responses"
        return routes[:, start : start + width], [note]
    raise ConfigError(
        f"routes of {length} positions, the mask has {width}; record the routes of whole sequences "
        "with `prompts` beside them, or those where response tokens are predicted"
    )


def _from_rows(lines: Iterable[Any]) -> RecordedBatch:
    """Rows of one sequence each, with a list a field over all of its tokens."""
    rows = list(lines)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping) or "mask" not in find_names(row):
            raise ConfigError(
                f"row {number}: no mask of response tokens ({' or '.join(NAMES['mask'][1:])}); "
                "give token exports of prime-rl or the training data of NeMo-RL"
            )
    if not rows:
        raise ConfigError("no rows; the export is empty")
    columns: dict[str, list[Tensor]] = {}
    for number, row in enumerate(rows, start=1):
        own = {
            field: _sequence(row[name], name, number, as_float=field in _FLOATS)
            for field, name in find_names(row).items()
        }
        lengths = {field: len(values) for field, values in own.items()}
        if len(set(lengths.values())) > 1:
            raise ConfigError(f"row {number}: fields of unequal lengths {lengths}")
        for field, values in own.items():
            columns.setdefault(field, []).append(values)
    left_out = {f: "not in every row" for f, values in columns.items() if len(values) < len(rows)}
    # Without a loss that has advantages, prime-rl writes nulls alone.
    if "advantages" in columns and all(values.isnan().all() for values in columns["advantages"]):
        left_out["advantages"] = "null at every token"
    notes = tuple(f"{field}: {why}, left out" for field, why in left_out.items())
    whole = {
        field: torch.nn.utils.rnn.pad_sequence(
            values, batch_first=True, padding_value=-1 if values[0].ndim == 3 else 0
        )
        for field, values in columns.items()
        if field not in left_out
    }
    mask = whole["mask"] > 0
    for name in ("sample_mask", "sample_loss_mask"):  # NeMo-RL's: sequences that do not count
        if all(name in row for row in rows):
            mask &= torch.tensor([[float(np.ravel(row[name])[0])] for row in rows]) > 0
    if all("rl_weights" in row for row in rows):  # prime-rl's: the tokens of its RL loss
        weights = [_sequence(r["rl_weights"], "rl_weights", n + 1) for n, r in enumerate(rows)]
        mask &= torch.nn.utils.rnn.pad_sequence(weights, batch_first=True) != 0
    # The first token of a sequence is predicted by nothing.
    mask[:, 0] = False
    for field in ("routes", "trainer_routes"):
        if field in whole:
            whole[field] = where_predicted(without_fills(whole[field]))
    source = "prime-rl" if "inference_logprobs" in rows[0] else "NeMo-RL"
    fields: dict[str, Any] = whole | {"mask": mask}
    return RecordedBatch(source=source, notes=notes, **fields)


def _sequence(values: Any, name: str, number: int, *, as_float: bool = True) -> Tensor:
    """A row's list as a tensor; null: a number that JSON cannot hold. NeMo-RL's has one around.

    Args:
        as_float: whatever the list holds: some tools write 0.0 as 0.
    """
    if isinstance(values, list) and len(values) == 1 and isinstance(values[0], list):
        values = values[0]
    if not isinstance(values, list):
        raise ConfigError(f"row {number}: {name} is no list of one value a token")
    try:
        return torch.tensor(
            [math.nan if value is None else value for value in values],
            dtype=torch.float64 if as_float else None,
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"row {number}: {name}: {error}") from error


def _from_trace(path: Path) -> RecordedBatch:
    """An engine's responses: routes alone."""
    trace = read_trace(path)
    routes = where_predicted(trace.routed_experts)
    if trace.response is None:
        mask = (routes >= 0).flatten(2).any(-1)
        notes = (*trace.notes, "the file does not say where responses begin: all tokens are taken")
    else:
        mask = torch.nn.functional.pad(trace.response[:, :-1], (1, 0), value=False)
        notes = trace.notes
    tokens = trace.tokens
    if tokens is not None:  # read one position before the next is predicted
        tokens = torch.nn.functional.pad(tokens[:, :-1], (1, 0), value=-1)
    return RecordedBatch(source=trace.source, mask=mask, routes=routes, tokens=tokens, notes=notes)


def _lines(path: Path) -> Iterator[Any]:
    """The objects of a JSONL file, or the one of a JSON file."""
    if path.suffix == ".json":
        yield json.loads(path.read_text(encoding="utf-8"))
        return
    try:
        yield from read_lines(path)
    except ValueError as error:  # of a folder, it is this file
        raise ConfigError(f"{path}: {error}") from error
