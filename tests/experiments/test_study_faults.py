"""A study whose runs are killed or which is stopped itself: what is kept, what is said."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe_rl.config import RunConfig
from moe_rl.experiments.runner import run_folder
from moe_rl.presets import preset
from moe_rl.run_folder.log import OUTPUT, is_complete
from moe_rl.training.run import train

_SECONDS = 180
_STEPS = 16
# As `moe-rl reproduce` does: failures on standard error, exit code 1 if there are any.
_STUDY = """
import json, sys
from pathlib import Path
from moe_rl.config import RunConfig
from moe_rl.experiments.executors.local import LocalExecutor
from moe_rl.experiments.runner import run_all
configs = [RunConfig.from_dict(values) for values in json.loads(sys.argv[1])]
try:
    executor = LocalExecutor(Path(sys.argv[3]))
    failures = run_all(configs, Path(sys.argv[2]), jobs=2, executor=executor)
except KeyboardInterrupt:
    sys.exit(130)
for failure in failures:
    print(f"{failure.folder}: {failure.reason}", file=sys.stderr)
sys.exit(bool(failures))
"""


def configs() -> list[RunConfig]:
    base = preset("tiny").replace(steps=_STEPS, sft_steps=10, save_every=_STEPS)
    return [base.replace(seed=seed).named() for seed in (1, 2)]


def start(root: Path, cold: Path) -> subprocess.Popen[str]:
    values = json.dumps([config.to_dict() for config in configs()])
    return subprocess.Popen(
        [sys.executable, "-c", _STUDY, values, str(root), str(cold)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until_all_train(root: Path) -> None:
    logs = [run_folder(root, config) / "updates.jsonl" for config in configs()]
    deadline = time.monotonic() + _SECONDS
    while not all(log.is_file() and log.stat().st_size for log in logs):
        assert time.monotonic() < deadline, "the runs do not begin"
        time.sleep(0.05)


def process_that_writes(file: Path) -> int:
    for output in Path("/proc").glob("[0-9]*/fd/1"):
        with contextlib.suppress(OSError):  # of another user, or gone
            if os.readlink(output) == str(file):
                return int(output.parts[2])
    raise AssertionError(f"no process writes {file}")


@pytest.mark.slow
def test_a_killed_run_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    train(configs()[0].replace(steps=1), tmp_path / "warm", cold_start_cache=tmp_path / "cold")
    root = tmp_path / "study"
    study = start(root, tmp_path / "cold")
    wait_until_all_train(root)
    folders = [run_folder(root, config) for config in configs()]
    os.kill(process_that_writes(folders[0] / OUTPUT), signal.SIGKILL)
    _, errors = study.communicate(timeout=_SECONDS)
    assert study.returncode == 1
    assert f"{folders[0]}: killed by SIGKILL" in errors and str(folders[1]) not in errors
    assert [is_complete(folder) for folder in folders] == [False, True]
    again = start(root, tmp_path / "cold")
    _, errors = again.communicate(timeout=_SECONDS)
    assert again.returncode == 0, errors
    assert all(is_complete(folder) for folder in folders)


@pytest.mark.slow
def test_a_stopped_study_goes_on_from_the_runs_checkpoints(tmp_path: Path) -> None:
    train(configs()[0], tmp_path / "whole", cold_start_cache=tmp_path / "cold")
    root = tmp_path / "study"
    study = start(root, tmp_path / "cold")
    wait_until_all_train(root)
    study.send_signal(signal.SIGTERM)
    study.communicate(timeout=_SECONDS)
    assert study.returncode == 130
    folders = [run_folder(root, config) for config in configs()]
    assert all((folder / "checkpoints" / "latest").is_file() for folder in folders)
    again = start(root, tmp_path / "cold")
    _, errors = again.communicate(timeout=_SECONDS)
    assert again.returncode == 0, errors
    weights = [
        (folder / f"policy_{_STEPS:05d}" / "model.safetensors").read_bytes()
        for folder in (folders[0], tmp_path / "whole")
    ]
    assert weights[0] == weights[1]
