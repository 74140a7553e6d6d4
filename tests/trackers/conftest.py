"""What the tests of trackers share: runs of a second, one of them killed in the middle."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_rl.config import RunConfig, preset
from moe_rl.runlog import RunLog

sys.path.insert(0, str(Path(__file__).parent))


class Killed(BaseException):
    """Stands in for a process that ends: nothing of ours catches it."""


@pytest.fixture(scope="session")
def cold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cold")


@pytest.fixture(scope="session")
def config() -> RunConfig:
    """3 rollouts of 4 updates, a checkpoint after every third update."""
    small = {"steps": 3, "prompts_per_rollout": 4, "group_size": 4, "checkpoint_every": 3}
    return preset("tiny").replace(sft_steps=20, **small).named()


@pytest.fixture
def kill_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], type[Killed]]:
    """Let the run die once `updates` more of them are logged; gives what to expect."""
    real = RunLog.update

    def arm(updates: int) -> type[Killed]:
        left = [updates]

        def update(self: RunLog, values: Any) -> None:
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            real(self, values)

        monkeypatch.setattr(RunLog, "update", update)
        return Killed

    return arm
