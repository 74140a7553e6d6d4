"""The judge `code`: the program of a response passes every test of its row.

A test gives a text on standard input and expects one on standard output, or calls a function, or a
method of `Solution`, with arguments (LiveCodeBench's `functional` tests, arXiv 2403.07974, and
APPS's with a `fn_name`, arXiv 2105.09938).

A program runs in a process and a folder of its own, within the limits of sandbox.py, and without
our environment variables. Where the system allows it (`unshare`), it has no network and sees no
other process.
"""

import base64
import contextlib
import json
import math
import os
import pickletools
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal, InvalidOperation
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from moe_rl.runtime.choice import Choice
from moe_rl.runtime.cores import cores
from moe_rl.runtime.strict import ConfigError
from moe_rl.tasks.sandbox import landlock_version

SECONDS, MEGABYTES = 6.0, 1024  # a test of LiveCodeBench has 6 seconds
_BLOCK = re.compile(r"```([^\n`]*)\n(.*?)```", re.S)
_CASES = ["public_test_cases", "private_test_cases", "test_cases", "input_output"]
_SANDBOX = Path(__file__).with_name("sandbox.py")
_UNSHARE = ("unshare", "--map-root-user", "--net", "--ipc", "--pid", "--fork", "--kill-child")
# What starter codes of functional tests take for granted, such as List.
_IMPORTS = "\n".join(
    f"from {name} import *"
    for name in ("typing", "collections", "functools", "itertools", "math", "heapq", "bisect")
)
_CALL = """
import json as _json, sys as _sys
_given = [_json.loads(line) for line in _sys.stdin.read().splitlines() if line.strip()]
_called = Solution().{name} if "Solution" in globals() else {name}
print("\\n" + _json.dumps(_called(*_given)))
"""


class Case(NamedTuple):
    """One test of a program."""

    input: str
    output: str
    function: str | None = None
    """Function, or method of `Solution`, that is called; None: the program reads and writes."""
    listed: bool = False
    """The output may stand in a list of one, as in some rows of APPS."""


def isolation() -> Choice:
    """How programs are isolated; the reason says what they may reach."""
    own = "only files of their own" if landlock_version() else "no Landlock: all files of the user"
    if shutil.which("unshare") is None:
        return Choice("limits", f"no unshare: network and other processes; {own}")
    tried = subprocess.run([*_UNSHARE, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        said = tried.stderr.strip().partition("\n")[0]
        return Choice("limits", f"network and other processes ({said}); {own}")
    return Choice("namespaces", f"no network, no other process; {own}")


def read_cases(row: Mapping[str, Any], column: str | None, where: str) -> list[Case]:
    """The tests of a row, as LiveCodeBench and APPS publish them.

    A list of {"input", "output", "testtype"}, or {"inputs": [...], "outputs": [...]} with texts,
    lists of lines or, beside a "fn_name", arguments and results; either also as JSON text; private
    tests of LiveCodeBench also compressed.

    Args:
        row: of the dataset.
        column: that holds the tests; None: those of `_CASES` that the row has.
        where: place of the row, for messages.

    Raises:
        ConfigError: there are no tests, or they have another form.
    """
    names = [column] if column else _CASES
    name, cases = "metadata", []
    try:
        # Other datasets have a column of this name too, of anything.
        metadata = row.get("metadata")
        if isinstance(metadata, str) and metadata.lstrip().startswith("{"):
            metadata = json.loads(metadata)
        function = metadata.get("func_name") if isinstance(metadata, dict) else None
        for name in names:
            found = _decode(row[name]) if row.get(name) else []
            if isinstance(found, dict):
                pairs = zip(found["inputs"], found["outputs"], strict=True)
                cases += [_listed_case(*pair, found.get("fn_name")) for pair in pairs]
                continue
            for test in found:
                called = function if test.get("testtype") == "functional" else None
                if test.get("testtype") == "functional" and not called:
                    raise ValueError("a functional test, and no func_name in the row's metadata")
                cases.append(Case(_lines(test["input"]), _lines(test["output"]), called))
    except (ValueError, KeyError, TypeError, AttributeError, zlib.error) as error:
        raise ConfigError(
            f"{where}: {name}: no tests of a program ({type(error).__name__}: {error}); give a "
            'list of {"input": text, "output": text}'
        ) from error
    if not cases:
        raise ConfigError(
            f"{where}: no tests in {' or '.join(names)}; name their column as answer_column"
        )
    return cases


def _listed_case(given: Any, expected: Any, function: str | None) -> Case:
    """A test of APPS."""
    if function is None:
        return Case(_lines(given), _lines(expected))
    arguments = "\n".join(json.dumps(argument) for argument in given)
    return Case(arguments, json.dumps(expected), function, listed=True)


def _lines(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _decode(value: Any) -> Any:
    """Tests from a list, JSON, or LiveCodeBench's compressed form: a pickled text of JSON.

    Nothing is unpickled: the one text is read from the list of the pickle's operations.
    """
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith(("[", "{")):
        return json.loads(value)
    operations = pickletools.genops(zlib.decompress(base64.b64decode(value)))
    (text,) = [argument for _, argument, _ in operations if isinstance(argument, str)]
    return json.loads(text)


def program_of(response: str) -> str:
    """The last fenced block of a response that is called Python, or the last; else all of it."""
    blocks = _BLOCK.findall(response)
    python = [text for language, text in blocks if language.strip().lower().startswith("py")]
    return str([response, *(text for _, text in blocks), *python][-1])


def pass_all(
    responses: Sequence[str],
    tests: Sequence[Sequence[Case]],
    *,
    seconds: float = SECONDS,
    megabytes: int = MEGABYTES,
) -> list[float]:
    """1.0 where the program of a response passes all tests, 0.0 elsewhere.

    Args:
        responses: texts.
        tests: of each response.
        seconds: CPU time of one test; three times as long on the clock.
        megabytes: address space of a program (MiB).
    """
    passes = partial(_passes, seconds=seconds, megabytes=megabytes)
    with ThreadPoolExecutor(cores()) as pool:
        return [float(right) for right in pool.map(passes, responses, tests)]


def _passes(response: str, cases: Sequence[Case], *, seconds: float, megabytes: int) -> bool:
    program = program_of(response)
    return all(
        matches(case, run_program(program, case, seconds=seconds, megabytes=megabytes))
        for case in cases
    )


def matches(case: Case, printed: str | None) -> bool:
    """Whether a program printed what a test expects; None: it failed.

    Lines are compared without white space at their ends, and numbers by value.
    """
    if printed is None:
        return False
    if case.function is not None:
        try:
            result, expected = json.loads(printed.splitlines()[-1]), json.loads(case.output)
            return result == expected or (case.listed and [result] == expected)
        except (ValueError, IndexError, RecursionError):
            return False
    found, expected = (
        [line.split() for line in text.strip().splitlines()] for text in (printed, case.output)
    )
    return len(found) == len(expected) and all(
        len(ours) == len(theirs) and all(map(_equal, ours, theirs))
        for ours, theirs in zip(found, expected, strict=True)
    )


def _equal(first: str, second: str) -> bool:
    if first == second:
        return True
    try:
        return Decimal(first) == Decimal(second)
    except InvalidOperation:
        return False


def run_program(program: str, case: Case, *, seconds: float, megabytes: int) -> str | None:
    """What a program prints for a test; None if it fails, or exceeds a limit."""
    if case.function is not None:
        program = f"{_IMPORTS}\n{program}\n{_CALL.format(name=case.function)}"
    with (
        tempfile.TemporaryDirectory(prefix="moe-rl-program-") as folder,
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryFile() as printed,
    ):
        (Path(folder) / "program.py").write_text(program, "utf-8", "surrogatepass")
        given.write(case.input.encode())
        given.seek(0)
        command = [sys.executable, "-I", str(_SANDBOX), str(math.ceil(seconds)), str(megabytes)]
        child = subprocess.Popen(
            [*_prefix(), *command],
            cwd=folder,
            # Nothing of ours, which may hold keys; one thread, as threads take address space.
            env={"PATH": os.defpath, "HOME": folder, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"},
            stdin=given,
            stdout=printed,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            code = child.wait(timeout=3 * seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _kill_group(child)
        printed.seek(0)
        return printed.read().decode(errors="replace") if code == 0 else None


def _kill_group(child: "subprocess.Popen[bytes]") -> None:
    """End what a program has started as well."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


@cache
def _prefix() -> tuple[str, ...]:
    return _UNSHARE if isolation().name == "namespaces" else ()
