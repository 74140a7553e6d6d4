"""The documents say what the code does: metric names, settings, links, files and tests they name."""

import ast
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from moe_rl.analysis.collapse import Outcome, stability_frontier
from moe_rl.analysis.measures import CHAIN
from moe_rl.config import preset
from moe_rl.trainer import train

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*DOCS, *sorted(ROOT.glob("*.md"))]
METRICS, PAPERS = ROOT / "docs" / "metrics.md", ROOT / "docs" / "papers.md"

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def sections(page: Path) -> dict[str, str]:
    """Text under each `## ` heading, its sub-headings included."""
    parts = re.split(r"^## (.+)$", page.read_text(), flags=re.M)
    return {title.strip("` "): text for title, text in zip(parts[1::2], parts[2::2], strict=True)}


def rows(text: str) -> Iterator[list[str]]:
    """The cells of every table row but the headings."""
    lines = text.splitlines()
    for above, line in zip(["", *lines], lines, strict=False):
        is_heading = lines[lines.index(line) + 1 :][:1] and re.match(
            r"\|-", lines[lines.index(line) + 1]
        )
        if line.startswith("|") and not line.startswith("|-") and not is_heading:
            yield [cell.strip() for cell in line.strip("|").split("|")]
