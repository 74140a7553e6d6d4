"""Errors of the disk, whoever writes: a full disk is an OSError in Python and not in Rust."""

import os
import re
from pathlib import Path
from types import TracebackType

_RUST = re.compile(r"\(os error (\d+)\)")


class WritesTo:
    """Turns what safetensors and tokenizers raise where the system refused into an OSError.

    safetensors has an error of its own, tokenizers raise a bare Exception; both quote the system's
    number.

        with WritesTo(folder):
            model.save_pretrained(folder)

    Args:
        path: the file or folder that the OSError names.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        found = None if isinstance(error, OSError) else _RUST.search(str(error))
        if error is not None and found is not None:
            number = int(found[1])
            raise OSError(number, os.strerror(number), str(self.path)) from error
