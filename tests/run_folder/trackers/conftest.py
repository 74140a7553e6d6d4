"""What the tests of trackers share: runs of a second."""

import sys
from pathlib import Path

import pytest

from moe_rl.config import RunConfig, preset

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def cold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cold")


@pytest.fixture(scope="session")
def config() -> RunConfig:
    """3 rollouts of 4 updates, a checkpoint after every third update."""
    small = {
        "steps": 3,
        "prompts_per_rollout": 4,
        "group_size": 4,
        "checkpoint_every": 3,
        "save_every": 3,
    }
    return preset("tiny").replace(sft_steps=20, **small).named()
