"""Errors of the disk, whoever writes: a full disk is an OSError in Python and not in Rust."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

_RUST = re.compile(r"\(os error (\d+)\)")


@contextlib.contextmanager
def writes_to(path: Path) -> Iterator[None]:
    """Turn what safetensors and tokenizers raise where the system refused into an OSError.

    safetensors has an error of its own, tokenizers raise a bare Exception; both quote the system's
    number.

        with writes_to(folder):
            model.save_pretrained(folder)

    Args:
        path: the file or folder that the OSError names.
    """
    try:
        yield
    except Exception as error:
        found = None if isinstance(error, OSError) else _RUST.search(str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from error
