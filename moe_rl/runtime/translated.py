"""A block whose errors are raised as others, where `except` could not name them.

Libraries in Rust raise Exception itself, which nothing but `except Exception` would catch: and that
would catch our own bugs.
"""

from collections.abc import Callable
from types import TracebackType


class Translated:
    """A context manager.

    Args:
        translate: what to raise in an error's place; None: the error itself.
    """

    def __init__(self, translate: Callable[[BaseException], BaseException | None]) -> None:
        self._translate = translate

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        ours = None if error is None else self._translate(error)
        if ours is not None:
            raise ours from error
