"""What tests/conftest.py adds to every run of the suite."""

import subprocess
import sys
from pathlib import Path

CONFTEST = Path(__file__).with_name("conftest.py")

SUITE = """
import os
import pytest

@pytest.mark.skip(reason="no such machine")
def test_skipped(): pass

@pytest.mark.parametrize("size", [1, 2])
def test_asks(size):
    if size == 2: pytest.skip("too large")

@pytest.mark.gpu
def test_on_a_gpu():
    import torch
    torch.zeros(1).cuda()

def test_environment():
    assert os.environ["HF_HUB_OFFLINE"] and os.environ["OMP_NUM_THREADS"]
"""


def test_a_run_lists_every_skipped_test_with_its_reason(tmp_path: Path) -> None:
    for file in (CONFTEST, CONFTEST.with_name("small_policy.py")):
        (tmp_path / file.name).write_text(file.read_text())
    (tmp_path / "test_suite.py").write_text(SUITE)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    command = [sys.executable, "-m", "pytest", "--color=no", "-p", "no:cacheprovider"]
    environment = {"CUDA_VISIBLE_DEVICES": "", "HOME": str(tmp_path)}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    table = run.stdout.split("skipped tests and why")[1]
    for reason, test in [
        ("no such machine", "test_skipped"),
        ("too large", "test_asks[2]"),
        ("no CUDA device", "test_on_a_gpu"),
    ]:
        assert f"{reason}:\n    test_suite.py::{test}\n" in table
    assert "2 passed, 3 skipped" in run.stdout
