"""What every test shares: the environment, the `gpu` marker, and the table of skipped tests.

Environment variables are set before the first `import torch`, and reach subprocesses too.
"""

import os
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import settings

# One thread: sums do not depend on the number of cores, and parallel suites do not fight.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# A test that reaches for the network fails here, not only on the machine that has none.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

# Without a GPU Triton's kernels run in its interpreter. Triton decides when it is imported, which
# a conftest of a folder may cause: so here, before the first.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

sys.path.insert(0, str(Path(__file__).parent))

from small_policy import small_policy

from moe_rl.policy.policy import Policy

# No deadline: a busy machine is not a bug. Fixed examples: a failure belongs to the change at hand.
settings.register_profile("moe_rl", deadline=None, derandomize=True)
settings.load_profile("moe_rl")


@pytest.fixture
def policy() -> Policy:
    """See `small_policy`."""
    return small_policy()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Files with slow tests first: begun last, one would run alone while other processes wait.
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    for item in items:
        if item.get_closest_marker("sweep") and "sweep" not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="runs with -m sweep alone"))
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List every skipped test under its reason, so that no test is missing in silence."""
    skipped = terminalreporter.stats.get("skipped", [])
    if not skipped:
        return
    tests_by_reason: dict[str, list[str]] = defaultdict(list)
    for report in skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        tests_by_reason[reason.removeprefix("Skipped: ")].append(report.nodeid)
    terminalreporter.section("skipped tests and why")
    for reason, tests in sorted(tests_by_reason.items()):
        terminalreporter.write_line(f"{reason}:")
        for test in tests:
            terminalreporter.write_line(f"    {test}")
