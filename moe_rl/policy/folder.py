"""A folder of a Hugging Face model, as far as its files tell without building the model.

Missing, cut off and pickled weights are found here in milliseconds, before torch is imported and
before anything is written. Importable without torch.
"""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from moe_rl.config import ConfigError
from moe_rl.runtime.json_text import parse_json

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_TOKENIZERS = ("tokenizer*", "vocab*", "*.tiktoken", "spiece.model")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def check_model_folder(folder: Path, name: str, *, tokenizer: bool = True) -> None:
    """Refuse a folder whose files cannot be a whole model.

    Args:
        folder: the folder.
        name: what messages begin with.
        tokenizer: whether a tokenizer must be beside the model.

    Raises:
        ConfigError: no config.json; a file that is not what its name says; weights that are
            missing, cut off or pickled; no tokenizer.
    """
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"{name}: no config.json there; give the folder of a Hugging Face model")
    try:
        _object(folder / CONFIG)
        if (folder / WEIGHTS).is_file():  # transformers looks for it first
            _weights(folder / WEIGHTS)
        elif (folder / INDEX).is_file():
            _check_shards(folder)
        else:
            raise ValueError(_without_weights(folder))
        if tokenizer:
            _check_tokenizer(folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"{name}: cannot be loaded ({first_line(error)})") from error


def first_line(error: BaseException) -> str:
    """What an error says, on one line."""
    if isinstance(error, KeyError):
        return f"no {error}"
    lines = str(error).strip().splitlines()
    if not lines:
        return repr(error)
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])


def _check_tokenizer(folder: Path) -> None:
    if not any(found for glob in _TOKENIZERS for found in folder.glob(glob)):
        raise ValueError("no tokenizer beside the model; save it into the folder")
    if (folder / TOKENIZER).is_file():
        _object(folder / TOKENIZER)


def _without_weights(folder: Path) -> str:
    pickled = sorted(file.name for glob in _PICKLED for file in folder.glob(glob))
    if not pickled:
        return f"no {WEIGHTS} there"
    return (
        f"its weights are pickled, in {pickled[0]}, and reading them could run code; save the "
        "model as safetensors"
    )


def _check_shards(folder: Path) -> None:
    """Every shard of the index is there and holds the weights that the index places in it."""
    places = _object(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(x, str) for x in places.values()):
        raise ValueError(f"{INDEX} has no weight_map of weights to files")
    shards: dict[str, list[str]] = {}
    for weight, shard in places.items():
        shards.setdefault(shard, []).append(weight)
    if not shards:
        raise ValueError(f"{INDEX} names no file")
    for shard, weights in sorted(shards.items()):
        if not (folder / shard).is_file():
            raise ValueError(f"{shard!r:.80} is missing, which {INDEX} names")
        lacking = set(weights) - _weights(folder / shard)
        if lacking:
            raise ValueError(
                f"{shard} lacks {len(lacking)} of the weights that {INDEX} places in it, "
                f"{min(lacking)!r:.80} for one"
            )


def _weights(file: Path) -> set[str]:
    """Names of the weights in a file that is as long as its header says."""
    try:
        with safe_open(file, framework="numpy") as opened:
            return set(opened.keys())
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{file.name} is no whole safetensors file: {first_line(error)}"
        ) from error


def _object(file: Path) -> dict[str, Any]:
    try:
        value = parse_json(file.read_text(encoding="utf-8"), unique_keys=False)
    except ValueError as error:
        raise ValueError(f"{file.name}: not JSON, {first_line(error)}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file.name}: not an object")
    return value
