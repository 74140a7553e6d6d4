"""Commands in this process: importing torch anew takes seconds."""

from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from runs import Here

from moe_rl.commands.cli import main


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> Here:
    """`moe-rl WORDS` in a fresh folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: str) -> "CompletedProcess[str]":
        capfd.readouterr()
        code = main(words)
        return CompletedProcess(words, code, *capfd.readouterr())

    return run
