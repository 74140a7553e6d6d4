"""Runs commands in processes forked from one that has imported torch: anew it takes seconds.

    python tests/faults/warm.py < orders, a JSON object a line

The order names the folder to be in, the words behind `moe-rl` and the files for what is printed;
the answer is a line with the exit code. A forked process runs what `python -m moe_rl` runs.
"""

import importlib
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import IO, Any

IMPORTS = (
    "commands.cli",
    "commands.check_replay",
    "commands.churn",
    "training.run",
    "analysis",
    "experiments.collapse",
)
SECONDS = 600


class Warm:
    """The process that forks, started when it is first needed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(
        self, *words: str, cwd: Path, file_size: int | None = None
    ) -> subprocess.CompletedProcess[str]:
        """As `subprocess.run` of `python -m moe_rl WORDS`."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"COLUMNS": "200", "NO_COLOR": "1"},
            )
        printed = [cwd.with_name(f"{cwd.name}.{name}") for name in ("stdout", "stderr")]
        order = {"words": words, "cwd": str(cwd), "file_size": file_size}
        orders, answers = self._pipes()
        print(json.dumps(order | {"printed": list(map(str, printed))}), file=orders, flush=True)
        code = int(answers.readline())
        stdout, stderr = (path.read_text() for path in printed)
        return subprocess.CompletedProcess(words, code, stdout, stderr)

    def close(self) -> None:
        """Let the process end."""
        if self._process is not None:
            self._pipes()[0].close()
            self._process.wait()

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        assert self._process and self._process.stdin and self._process.stdout
        return self._process.stdin, self._process.stdout


def serve() -> None:
    for name in IMPORTS:
        importlib.import_module(f"moe_rl.{name}")
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            obey(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def obey(order: dict[str, Any]) -> None:
    """Be the command, and end."""
    signal.alarm(SECONDS)
    os.chdir(order["cwd"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in enumerate(order["printed"], start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if order["file_size"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_size"],) * 2)
    sys.argv = ["moe_rl", *order["words"]]
    code = 1
    try:
        runpy.run_module("moe_rl", run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
