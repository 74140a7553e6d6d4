"""Names of other trainers: those that docs/metrics.md lists, and that their packages really log."""

import importlib.util
import re
from pathlib import Path
from typing import get_args

import pytest

from moe_rl.metrics.names import NAMES, Dialect, rename
from moe_rl.run_folder import trackers

DIALECTS = get_args(Dialect)
PAGE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"


def table() -> dict[str, dict[str, str]]:
    """The table of names in docs/metrics.md."""
    section = PAGE.read_text().split("## Names in other trainers")[1].split("\n## ")[0]
    rows = [
        [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("| ")
    ]
    heading, *body = rows
    assert tuple(heading[1:]) == DIALECTS
    return {
        row[0]: {d: n for d, n in zip(DIALECTS, row[1:], strict=True) if n}
        for row in body
        if not row[0].startswith("-")
    }


def test_the_page_lists_every_name_and_no_other() -> None:
    assert table() == NAMES


def test_every_metric_of_ours_that_is_named_is_one_that_we_log() -> None:
    defined = set(re.findall(r"`([a-z0-9_/]+)`", PAGE.read_text()))
    assert set(NAMES) <= defined


@pytest.mark.parametrize("dialect", ["verl", "trl"])
def test_their_names_stand_in_their_source(dialect: Dialect) -> None:
    found = importlib.util.find_spec(dialect)
    if found is None or found.origin is None:
        pytest.skip(f"{dialect} is not installed")
    source = "\n".join(
        file.read_text(errors="replace") for file in Path(found.origin).parent.rglob("*.py")
    )
    for names in NAMES.values():
        name = names.get(dialect)
        if name is None:
            continue
        # Prefixes and statistics are put around a name in other places than the name itself.
        parts = [part for part in re.split(r"/|_mean$", name) if part not in ("", "mean")]
        assert all(part in source for part in parts), name


@pytest.mark.parametrize("dialect", DIALECTS)
def test_renamed_metrics_are_the_same_values_and_none_is_lost(dialect: Dialect) -> None:
    metrics = {name: float(number) for number, name in enumerate(NAMES)}
    metrics |= {"update/kl": 77.0, "routing/churn": 78.0}
    del metrics["kl"]
    found = rename(metrics, dialect)
    assert sorted(found.values()) == sorted(metrics.values())
    for name, value in metrics.items():
        theirs = NAMES.get(name.removeprefix("update/"), {}).get(dialect, name)
        assert found[theirs] == value


def test_a_tracker_shows_them() -> None:
    seen = []

    def silent(run: trackers.TrackedRun) -> tuple[trackers.Log, trackers.Finish]:
        return lambda axis, x, values: seen.append((axis, x, dict(values))), lambda: None

    run = trackers.TrackedRun(
        name="r", config={}, folder=Path(), updates_per_rollout=4, resumed=False
    )
    speaking = trackers._speaking(silent, "verl")
    assert speaking.__name__ == "silent"
    shown = trackers.Trackers([speaking], run)
    shown.log("step", {"step": 2, "reward": 0.5, "routing/churn": 0.1})
    shown.log("update", {"step": 2, "update": 1, "kl": 0.01})
    assert seen == [
        ("step", 2, {"critic/rewards/mean": 0.5, "routing/churn": 0.1}),
        ("update", 9, {"actor/ppo_kl": 0.01}),
    ]
