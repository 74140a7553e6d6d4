"""Errors of the disk, whoever writes: a full disk is an OSError in Python and not in Rust."""

import os
import re
from pathlib import Path

from moe_rl.runtime.translated import Translated

_RUST = re.compile(r"\(os error (\d+)\)")


def writes_to(path: Path) -> Translated:
    """Turns what safetensors and tokenizers raise where the system refused into an OSError.

    safetensors has an error of its own, tokenizers raise a bare Exception; both quote the system's
    number.

        with writes_to(folder):
            model.save_pretrained(folder)

    Args:
        path: the file or folder that the OSError names.
    """

    def translate(error: BaseException) -> OSError | None:
        found = None if isinstance(error, OSError) else _RUST.search(str(error))
        if found is None:
            return None
        number = int(found[1])
        return OSError(number, os.strerror(number), str(path))

    return Translated(translate)
