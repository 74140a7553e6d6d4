"""Starts a few processes that train together, as torchrun does but without its import time."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

WORKERS = Path(__file__).with_name("workers.py")
_SECONDS = 240
_NATIVE_DEATHS = (-signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS)


def start(arguments: list[str], size: int, **options: object) -> list[subprocess.Popen[str]]:
    """`python ARGUMENTS` on `size` ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(size):
        place = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(WORKERS.parents[1]),
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, *arguments],
                env=os.environ | place,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                **options,  # type: ignore[call-overload]
            )
        )
    return processes


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each rank; those that take too long are killed."""
    until = time.monotonic() + _SECONDS
    try:
        return [_end(process, until) for process in processes]
    finally:
        for process in processes:
            process.kill()


def _end(process: subprocess.Popen[str], until: float) -> tuple[int, str, str]:
    try:
        said = process.communicate(timeout=max(0.1, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        said = process.communicate()
    return process.returncode, *said


def run_worker(name: str, size: int, folder: Path, *arguments: str) -> None:
    """A function of workers.py on `size` ranks; what it finds lies in `folder`.

    Ranks of which the C library ends one are started once more. One in some hundred starts under
    FSDP was, with "malloc(): unaligned tcache chunk detected", while no code of ours manages memory
    and a checked heap finds nothing wrong; the next one prints where each of its threads was.
    """
    command = ["-X", "faulthandler", str(WORKERS), name, str(folder), *arguments]
    ended = finish(start(command, size))
    if any(_died_in_native_code(code, err) for code, _, err in ended):
        errors = "\n".join(err for _, _, err in ended)
        warnings.warn(f"{name} on {size} ranks died in native code:\n{errors}", stacklevel=2)
        for log in folder.glob("*/steps.jsonl"):  # or the next ones would go on from there
            shutil.rmtree(log.parent)
        ended = finish(start(command, size))
    for code, out, err in ended:
        assert code == 0, f"{out}\n{err}"


def _died_in_native_code(code: int, errors: str) -> bool:
    """But not by a C++ exception that nobody caught, which says what is wrong."""
    return code in _NATIVE_DEATHS and "terminate called" not in errors
