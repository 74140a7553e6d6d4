"""A function of the user's own, from a file or a module, pinned by the SHA-256 of its source."""

import contextlib
import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from moe_rl.runtime.strict import ConfigError


class OwnFunction(NamedTuple):
    """A function, and the source of its file."""

    function: Callable[..., Any]
    source: bytes
    sha256: str
    """Of the source, in hexadecimal digits."""
    errors: Callable[[], AbstractContextManager[None]]
    """Within it, whatever goes wrong is one line that names the user's file and its line."""


def load_function(option: str, name: str, sha256: str | None = None) -> OwnFunction:
    """The function FILE.py:FUNCTION or MODULE:FUNCTION.

    Args:
        option: the setting that names it, such as loss; `OPTION_sha256` is the setting of its pin.
        name: as above.
        sha256: that the file must have; None: not checked.

    Raises:
        ConfigError: the file cannot be read or run, has another sha256 or no such function.
    """
    path, _, function_name = name.rpartition(":")
    said = f"{option}={name!r}"
    if not path.endswith(".py"):
        path = _file_of(path, said)
    try:
        source = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{said}: {path} cannot be read ({error.strerror}); give FILE.py:FUNCTION"
        ) from error
    found = hashlib.sha256(source).hexdigest()
    if sha256 not in (None, found):
        raise ConfigError(
            f"{said}: the sha256 of {path} is {found}, the config has {option}_sha256={sha256}: "
            f"the file was changed. Bring it back, or leave {option}_sha256 out for another run"
        )
    errors = functools.partial(one_line_errors, said, path)
    with errors():
        if name.startswith(f"{path}:"):
            # Run from the bytes that were hashed: an import would read the file again, and leave a
            # __pycache__ beside it. In sys.modules, because dataclasses look their module up there.
            module = sys.modules[f"own_{option}_{found[:16]}"] = ModuleType(
                f"own_{option}_{found[:16]}"
            )
            exec(compile(source, path, "exec"), module.__dict__)
        else:
            module = importlib.import_module(name.rpartition(":")[0])
    function = getattr(module, function_name, None)
    if not callable(function):
        own = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        nearest = difflib.get_close_matches(function_name, own, n=1, cutoff=0.0)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else "; define one"
        raise ConfigError(f"{said}: {path} has no function {function_name!r}{hint}")
    return OwnFunction(function, source, found, errors)


def _file_of(module: str, said: str) -> str:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise ConfigError(
            f"{said}: no module {module!r} with a source file is installed; give its FILE.py"
        )
    return spec.origin


@contextlib.contextmanager
def one_line_errors(said: str, path: str) -> Iterator[None]:
    """Turn an error within the user's file into one line, which begins with `said`."""
    try:
        yield
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == path]
        if isinstance(error, SyntaxError) and error.filename == path:
            lines.append(error.lineno)
        where = f"{path}, line {lines[-1]}" if lines else path
        text = (str(error).splitlines() or [""])[0]
        raise ConfigError(
            f"{said}: {where}: {type(error).__name__}: {text}; correct the file"
        ) from error
