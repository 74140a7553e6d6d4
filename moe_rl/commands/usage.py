"""One clear line for what a user got wrong: words of the command line, files, sizes.

Options are parsed by tyro. It draws its errors as boxes of many lines; what they say is kept here,
the frame is not.
"""

import contextlib
import errno
import io
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import tyro

from moe_rl.config import ConfigError

# What tyro draws its boxes with.
_SIDE, _RULE, _TOP_LEFT, _BOTTOM_LEFT = "\u2502", "\u2500", "\u256d", "\u2570"


def parse(options: type, arguments: Sequence[str], program: str, **settings: Any) -> Any:
    """An instance of `options`.

    Args:
        options: a dataclass.
        arguments: words after the subcommand.
        program: what the help calls the command.
        settings: passed on to `tyro.cli`.

    Raises:
        ConfigError: an unknown option, a missing or malformed value; the nearest option is named.
        SystemExit: after `--help`.
    """
    if {"-h", "--help"} & set(arguments):
        return tyro.cli(options, args=arguments, prog=program, **settings)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), _very_wide():
            return tyro.cli(options, args=arguments, prog=program, **settings)
    except SystemExit as stop:
        raise ConfigError(f"{_one_line(said.getvalue())} (see {program} --help)") from stop


@contextlib.contextmanager
def _very_wide() -> Iterator[None]:
    """Let no message be broken into lines."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "10000"
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def _one_line(box: str) -> str:
    """The message of an error box, and the option it suggests."""
    corners = (_TOP_LEFT, _BOTTOM_LEFT)
    lines = [line.strip(f"{_SIDE} ") for line in box.splitlines() if not line.startswith(corners)]
    rules = [i for i, line in enumerate(lines) if set(line) == {_RULE}]
    message = " ".join(lines[: rules[0]] if rules else lines)
    message = re.sub(r"^Error parsing run(\.[\w-]+)?: ", "", message)
    unknown = re.match(r"Unrecognized options: (\S+)", message)
    if unknown is None:
        return message.strip().rstrip(".")
    nearest = re.search(r"Perhaps you meant:\s+(--[\w-]+)", "\n".join(lines))
    hint = f"; did you mean {nearest[1]}?" if nearest else ""
    kind = "unknown option" if unknown[1].startswith("-") else "unexpected argument"
    return f"{kind} {unknown[1].rstrip(',')}{hint}"


# What is wrong, and the way out.
_OS_ERRORS = {
    errno.ENOSPC: "the disk is full; what was written stays",
    errno.EDQUOT: "your quota of the disk is full; what was written stays",
    errno.EFBIG: "larger than files may be here (ulimit -f); what was written stays",
    errno.ENOTDIR: "a part of this path is a file; choose another",
    errno.EEXIST: "a file is in the way; choose another path",
    errno.EISDIR: "a folder, where a file is expected",
    errno.ENOENT: "no such file or folder",
    errno.EACCES: "permission denied; choose a path that you may use",
    errno.EROFS: "a read-only file system; choose another path",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.ELOOP: "symbolic links that lead in a circle; choose another path",
}


def one_line(message: str) -> str:
    """A message with what does not print spelled out: names of files may hold any character."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in message
    )


def describe_os_error(error: OSError) -> str:
    """The file of an `OSError`, what is wrong with it and the way out."""
    said = _OS_ERRORS.get(error.errno or 0)
    return f"{error.filename or 'output'}: {said}" if said else str(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether sizes are at fault: torch says so in a RuntimeError's text only."""
    text = str(error)
    return isinstance(error, MemoryError) or bool(
        re.search(r"can't allocate|alloc_cpu|out of memory|Storage size calculation", text)
    )


def is_lost_peer(error: BaseException) -> bool:
    """Whether a process of a group is gone: torch says so in a RuntimeError's text only."""
    return bool(re.search(r"gloo|NCCL|[Cc]onnection (closed|reset|refused)", str(error)))
