"""docs/faults.md read as data, and one of its rows tried on the real command line."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults.warm import Warm
from runs import moe_rl

PAGE = Path(__file__).resolve().parents[2] / "docs" / "faults.md"
HEAD = "what is wrong", "what you get", "exit code"


@dataclass(frozen=True)
class Fault:
    """How a row is tried.

    Args:
        command: words behind `moe-rl`, in a fresh folder.
        given: puts the bad input into that folder; what it returns lives as long as the command.
        torch: whether the command imports torch; it is then forked from a process that has.
        writes: whether files may come to be: of a run that had begun.
        file_size: bytes that no file may exceed, which is what a full disk looks like.
        child: called in the process of the command, before it begins; not with `torch`.
    """

    command: tuple[str, ...]
    given: Callable[[Path], Any] = lambda folder: None
    torch: bool = False
    writes: bool = False
    file_size: int | None = None
    child: Callable[[], None] | None = None


@dataclass(frozen=True)
class Row:
    message: str
    code: int


def rows() -> dict[str, dict[str, Row]]:
    """Rows of every table by the heading above it, then by what is wrong."""
    found: dict[str, dict[str, Row]] = {}
    heading, within = "", False
    for line in PAGE.read_text().splitlines():
        if line.startswith("## "):
            heading = line.removeprefix("## ")
        cells = tuple(cell.strip() for cell in line.strip("|").split("|"))
        within = line.startswith("|") and (within or cells == HEAD)
        if not within or cells == HEAD or set("".join(cells)) <= {"-"}:
            continue
        what, message, code = cells
        assert what not in found.setdefault(heading, {}), f"two rows: {what}"
        assert re.fullmatch("`[^`]+`", message), f"no message in one code span: {line}"
        found[heading][what] = Row(message=message.strip("`"), code=int(code))
    return found


def pattern(message: str) -> re.Pattern[str]:
    """What a message must begin with; `...` stands for what differs from machine to machine."""
    return re.compile(".*".join(re.escape(part) for part in message.split("...")))


def contents(folder: Path) -> dict[str, int]:
    """Sizes of all that is in a folder; -1 for what is no plain file."""
    return {
        str(path.relative_to(folder)): path.stat().st_size
        if path.is_file() and not path.is_symlink()
        else -1
        for path in folder.rglob("*")
    }


def try_out(fault: Fault, row: Row, folder: Path, warm: Warm) -> None:
    """Assert that the command says what the row says, in one line, and leaves nothing behind."""
    kept = fault.given(folder)
    before = contents(folder)
    if fault.torch:
        done = warm.run(*fault.command, cwd=folder, file_size=fault.file_size)
    else:
        done = moe_rl(*fault.command, cwd=folder, child=fault.child)
    del kept
    shown = done.stdout + done.stderr
    assert "Traceback" not in shown, shown
    assert done.returncode == row.code, shown
    said = done.stderr if row.code else done.stdout
    assert said, shown
    assert pattern(row.message).match(said.splitlines()[-1].removeprefix("moe-rl: ")), shown
    if not fault.writes:
        assert done.stderr.count("\n") == 1 and not done.stdout, shown
        assert contents(folder) == before
