"""Models and tokenizers from local Hugging Face folders; whatever is wrong is a ConfigError."""

from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from moe_rl.config import ConfigError
from moe_rl.policy.folder import CONFIG, check_model_folder, first_line
from moe_rl.runtime.json_text import parse_json
from moe_rl.runtime.translated import Translated

# Small checkpoints load at once; the library's bars would break our one line a step.
transformers.utils.logging.disable_progress_bar()
# It would ask on the terminal whether to run code that lies in the folder. 0 seconds: it refuses.
transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0

# What transformers raises on a file that is not as it expects: it checks little beforehand.
_UNREADABLE = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError),
    *(RuntimeError, TypeError, ValueError, SafetensorError, StrictDataclassError),
)


def load_model(folder: Path, name: str, *, tokenizer: bool, **options: Any) -> Any:
    """The causal LM in `folder`, with every weight from its files.

    Args:
        folder: the folder.
        name: what messages begin with.
        tokenizer: whether a tokenizer must be beside the model.
        options: further arguments of `from_pretrained`.

    Raises:
        ConfigError: anything is wrong with the folder. That weights are missing or of other shapes
            is an error too: transformers would draw them at random.
    """
    check_model_folder(folder, name, tokenizer=tokenizer)
    values = parse_json((folder / CONFIG).read_text(encoding="utf-8"), unique_keys=False)
    if "auto_map" in values and values.get("model_type") not in CONFIG_MAPPING:
        raise ConfigError(
            f"{name}: its model_type {values.get('model_type')!r:.60} is code in the folder, which "
            "is never run; give a model that transformers knows"
        )
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # its report of weights is a table of many lines
    try:
        with _loads(name):
            AutoConfig.from_pretrained(folder, local_files_only=True)
            model, found = AutoModelForCausalLM.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                output_loading_info=True,
                **options,
            )
    finally:
        transformers.logging.set_verbosity(verbosity)
    _check_all_weights(name, found)
    return model


def load_tokenizer(folder: Path, name: str) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    with _loads(name):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _check_all_weights(name: str, found: dict[str, Any]) -> None:
    mismatched = sorted(found["mismatched_keys"])
    if mismatched:
        weight, given, wanted = mismatched[0]
        raise ConfigError(
            f"{name}: cannot be loaded ({weight} is {list(given)}, its config makes it "
            f"{list(wanted)}; {len(mismatched)} weights do not fit)"
        )
    missing = sorted(found["missing_keys"])
    if missing:
        raise ConfigError(
            f"{name}: cannot be loaded (its files lack {len(missing)} of the model's weights, "
            f"{missing[0]} for one)"
        )


def _loads(name: str) -> Translated:
    """Turns what a library says of a folder into a ConfigError."""

    def translate(error: BaseException) -> ConfigError | None:
        # The tokenizers' Rust raises Exception itself, of no class of its own.
        if type(error) is Exception or isinstance(error, _UNREADABLE):
            return ConfigError(f"{name}: cannot be loaded ({first_line(error)})")
        return None

    return Translated(translate)
