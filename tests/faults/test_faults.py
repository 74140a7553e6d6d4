"""Every row of docs/faults.md on the real command line: the message, one line, the exit code.

And no more than the rows: what is tried here is in the table, what is in the table is tried.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.datasets import DATASETS
from faults.folders import RUN_FOLDERS, STUDIES
from faults.models import MODELS
from faults.options import CONFIGS, OPTIONS
from faults.runs import RUNS
from faults.states import STATES
from faults.table import Fault, moe_rl, pattern, rows, try_out
from faults.traces import TRACES
from faults.warm import Warm

TABLES: dict[str, dict[str, Fault]] = {
    "Options": OPTIONS,
    "Config files": CONFIGS,
    "Run folders": RUN_FOLDERS,
    "Checkpoints and crash bundles": STATES,
    "Studies and reports": STUDIES,
    "Model folders": MODELS,
    "Datasets": DATASETS,
    "Recorded traces": TRACES,
    "A run under way": RUNS,
}
ROWS = rows()


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    process = Warm()
    yield process
    process.close()


def test_every_row_is_tried_and_every_trial_is_a_row() -> None:
    assert {heading: list(table) for heading, table in ROWS.items()} == {
        heading: list(table) for heading, table in TABLES.items()
    }


@pytest.mark.parametrize(
    ("heading", "what"), [(heading, what) for heading in TABLES for what in TABLES[heading]]
)
def test_what_the_table_says_is_what_a_user_gets(
    heading: str, what: str, tmp_path: Path, warm: Warm
) -> None:
    (tmp_path / "here").mkdir()
    try_out(TABLES[heading][what], ROWS[heading][what], tmp_path / "here", warm)


def test_a_forked_command_is_the_command(tmp_path: Path, warm: Warm) -> None:
    """Rows that import torch are forked from a process that has; one of them also starts anew."""
    fault = MODELS["a model without experts"]
    for name in ("forked", "anew"):
        (tmp_path / name).mkdir()
        fault.given(tmp_path / name)
    forked = warm.run(*fault.command, cwd=tmp_path / "forked")
    anew = moe_rl(*fault.command, cwd=tmp_path / "anew")
    assert (forked.returncode, forked.stdout, forked.stderr) == (
        anew.returncode,
        anew.stdout,
        anew.stderr,
    )


def test_three_points_in_a_message_stand_for_anything() -> None:
    assert pattern("a=...: no [x]").match("a=1 (2): no [x], and more")
    assert not pattern("a=...: no [x]").match("a=1 (2): no x")
    assert not pattern("no").match("a no")


def test_hostile_names_that_are_fine_are_fine(tmp_path: Path, warm: Warm) -> None:
    """Line ends, quotes, escapes and the dots of a parent are letters like others."""
    name = "../in/two\nlines \u00e9\u202e'\"$(x)"
    (tmp_path / "in").mkdir()
    train = ("train", "--preset", "tiny", "--steps", "1", "--sft-steps", "2", "--out", name)
    done = warm.run(*train, cwd=tmp_path / "in")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "in" / name / "summary.json").read_text())
    assert summary["complete"] is True
