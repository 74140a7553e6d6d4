"""Models and tokenizers from Hugging Face folders or the hub: checked by their files, then loaded.

The check takes milliseconds and runs before anything is written. This module imports neither torch
nor transformers until something is loaded.
"""

import contextlib
import functools
import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open

from moe_rl.config import ConfigError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_TOKENIZERS = ("tokenizer*", "vocab*", "*.tiktoken", "spiece.model")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_HUB_ID = re.compile(r"(?!.*\.(json\w*|np[yz]|safetensors)$)[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?")
_HUB_FILES = ["*.json", "*.jinja", "*.safetensors", "*.txt", "*.tiktoken", "*.model"]


@functools.cache
def find_model(name: str, option: str = "checkpoint") -> Path:
    """The folder of a model: `name` itself, or where the hub's files of that id are kept.

    A hub id is OWNER/NAME or OWNER/NAME@REVISION. Its files are downloaded once; without a network
    those of the local cache are taken.

    Raises:
        ConfigError: no such folder, and the hub's files are neither here nor to be had.
    """
    folder = Path(name)
    if folder.exists() or not _HUB_ID.fullmatch(name):
        return folder
    from huggingface_hub import snapshot_download

    identity, _, revision = name.partition("@")
    with loading(f"{option}={name!r}: no such folder here; from the hub"):
        return Path(
            snapshot_download(identity, revision=revision or None, allow_patterns=_HUB_FILES)
        )


def check_model_folder(folder: Path, name: str, *, tokenizer: bool = True) -> None:
    """Refuse a folder whose files cannot be a whole model; errors begin with `name`.

    Raises:
        ConfigError: no config.json; weights that are missing, cut off or pickled; no tokenizer.
    """
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{name}: no config.json there; give the folder of a Hugging Face model")
    shards = [WEIGHTS]
    if (folder / INDEX).is_file() and not (folder / WEIGHTS).is_file():
        with loading(name, INDEX):
            shards = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    elif not (folder / WEIGHTS).is_file():
        pickled = sorted(file.name for glob in _PICKLED for file in folder.glob(glob))
        found = f"; {pickled[0]} is pickled, and reading it could run code" if pickled else ""
        raise ConfigError(
            f"{name}: cannot be loaded (no {WEIGHTS} there{found}); save the model as safetensors"
        )
    for shard in shards:
        with loading(name, shard), safe_open(folder / shard, framework="numpy"):
            pass  # opening compares the file's length with its header
    if tokenizer and not any(found for glob in _TOKENIZERS for found in folder.glob(glob)):
        raise ConfigError(f"{name}: cannot be loaded (no tokenizer there); save it into the folder")


def load_model(folder: Path, name: str, *, tokenizer: bool, **options: Any) -> Any:
    """The causal LM in `folder`, with every weight from its files; errors begin with `name`.

    Raises:
        ConfigError: anything is wrong with the folder. That weights are missing or of other shapes
            is an error too: transformers would draw them at random.
    """
    check_model_folder(folder, name, tokenizer=tokenizer)
    transformers = import_transformers()
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # its report of weights is a table of many lines
    try:
        with loading(name):
            model, found = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                output_loading_info=True,
                **options,
            )
    finally:
        transformers.logging.set_verbosity(verbosity)
    wrong = sorted(name for name, *_ in found["mismatched_keys"]) + sorted(found["missing_keys"])
    if wrong:
        raise ConfigError(
            f"{name}: cannot be loaded ({len(wrong)} weights of the model are missing in its files "
            f"or have other shapes there than its config gives them, {wrong[0]} for one)"
        )
    return model


def as_loaded(model: Any, dtype: Any) -> Any:
    """A model of transformers as it would be loaded in `dtype` from a folder of its weights.

    Only the loader knows which parameters and buffers a family keeps in float32: a cast would take
    rotary tables and correction biases along.
    """
    import_transformers()
    # The loader's own way for weights that are at hand; it shares those that need no rounding.
    state = model.state_dict()
    loaded = type(model).from_pretrained(None, config=model.config, state_dict=state, dtype=dtype)
    # How the names of the weights in memory become those of files, where none were read: a file
    # would else get the names in memory, which other readers do not know.
    loaded._weight_conversions = getattr(model, "_weight_conversions", None)
    return loaded


def import_transformers() -> Any:
    """transformers without its progress bars, which would break our one line per step."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    # It would ask on the terminal whether to run code that lies in the folder. 0 s: it refuses.
    transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    return transformers


@contextlib.contextmanager
def loading(name: str, file: str = "") -> Iterator[None]:
    """Turn whatever a library raises on a broken file into a ConfigError of one line.

    transformers checks little beforehand, so that a broken file surfaces as nearly any exception;
    tokenizers, written in Rust, raises a bare Exception. `file`: where its message names none.
    """
    try:
        yield
    except Exception as error:
        # A KeyError says only the key.
        said = str(error) if " " in str(error) else repr(error)
        said = textwrap.shorten(f"{file}: {said}" if file else said, 300)
        raise ConfigError(f"{name}: cannot be loaded ({said})") from error
