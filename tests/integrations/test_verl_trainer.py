"""verl's own trainer, which needs an environment of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_real_trainer() -> None:
    """tests/real_verl, in the environment that `make verl` builds beside this one."""
    environment = Path(f"{sys.prefix}-verl")
    if not (environment / ".installed").exists():
        pytest.skip("all of verl is not installed: make verl")
    outer = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    outer |= {"RAY_AUTH_MODE": "disabled"}
    command = [environment / "bin" / "python", "-m", "pytest", "-q", "tests/real_verl"]
    found = subprocess.run(command, cwd=ROOT, env=outer, capture_output=True, text=True)
    print(found.stdout[-10_000:], found.stderr[-10_000:])
    assert found.returncode == 0, "tests/real_verl failed: its output is below"
