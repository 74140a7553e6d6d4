"""What tests of whole runs share: the real command, runs that die, and whether two are the same."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from moe_rl.training.learner import Learner

Here = Callable[..., "subprocess.CompletedProcess[str]"]
"""The fixture `here`: `moe-rl WORDS` in this process."""


def moe_rl(
    *words: str, cwd: Path, child: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[str]:
    """The command line as a user meets it; `child` is called in its process before it begins."""
    return subprocess.run(
        [sys.executable, "-m", "moe_rl", *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"COLUMNS": "200", "NO_COLOR": "1"},
        stdin=subprocess.DEVNULL,
        preexec_fn=child,
        timeout=600,
    )


class Killed(BaseException):
    """Stands in for a process that ends: nothing of ours catches it."""


@contextlib.contextmanager
def killed_after(updates: int) -> Iterator[None]:
    """A run within dies in the update after `updates` more, when its weights have moved."""
    real, left = Learner.update, [updates]

    def update(self: Learner, *arguments: Any) -> Any:
        metrics = real(self, *arguments)
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        return metrics

    Learner.update = update  # type: ignore[method-assign]
    try:
        yield
    finally:
        Learner.update = real  # type: ignore[method-assign]


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    """Lines of a log without times: those alone may differ."""
    found = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{k: v for k, v in line.items() if "seconds" not in k} for line in found]


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Metrics, rewards and all saved weights are bit for bit the same."""
    for name in ("steps.jsonl", "updates.jsonl"):
        assert lines(ours, name) == lines(theirs, name)
    rewards = [
        json.loads((run / "summary.json").read_text())["final_reward"] for run in (ours, theirs)
    ]
    assert rewards[0] == rewards[1]
    saved = [
        {path.relative_to(run): load_file(path) for path in run.glob("policy_*/*.safetensors")}
        for run in (ours, theirs)
    ]
    assert saved[0].keys() == saved[1].keys() and saved[1], "no saved weights to compare"
    for path, weights in saved[1].items():
        assert saved[0][path].keys() == weights.keys()
        assert all(torch.equal(saved[0][path][key], value) for key, value in weights.items()), path
