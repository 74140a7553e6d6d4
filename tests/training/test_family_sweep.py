"""Every causal LM family trains by `moe-rl train`, read in the way that docs/families.md says."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from runs import lines
from small_policy import ALPHABET

from moe_rl.commands.cli import main
from moe_rl.policy.tokenizer import tokenizer_of
from moe_rl.replay_check.families import build_family, causal_families

PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"
SMALL = ("--digits", "2", "--prompts-per-rollout", "4", "--group-size", "2")
RUN = ("--steps", "2", "--updates-per-rollout", "2", "--save-every", "2", *SMALL)
# Parameters outside the loss, logits that are scaled, experts of its own, a router with columns of
# shared experts, two routers a layer, and the kinds of memory that no cache of a group holds.
FEW = ["deepseek_v32", "cohere2_moe", "llama4_text", "inkling_text", "jetmoe", "kimi_linear"]


def documented() -> dict[str, str]:
    """How a family is read in training, by the last cell of its row on the page."""
    table = PAGE.read_text().partition("## The families")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` +\|.*\| ([^|]+?) +\|$", table, flags=re.M)
    return {name: cell for name, cell in rows if cell != "no causal LM"}


def trained(family: str, folder: Path, capfd: Any) -> str:
    """Train a small random model of the family for two steps; returns how it was read."""
    build_family(family, max_position_embeddings=64).save_pretrained(folder / family)
    tokenizer_of(ALPHABET).save_pretrained(folder / family)
    run = folder / f"run {family}"
    code = main(("train", "--checkpoint", str(folder / family), "--out", str(run), *RUN))
    said = capfd.readouterr().err.strip()
    if code:
        assert not run.exists(), f"{family}: a run folder is left behind: {said}"
        return f"refused: {said}"
    updates = lines(run, "updates.jsonl")
    assert len(updates) == 4 and not any(update["skipped"] for update in updates)
    layout: str = json.loads((run / "summary.json").read_text())["layout"]
    shutil.rmtree(folder / family)
    shutil.rmtree(run)
    return {"whole": "whole"}.get(layout, "cache")


@pytest.mark.parametrize("family", FEW)
def test_a_family_of_each_kind_trains_as_documented(
    family: str, tmp_path: Path, capfd: Any
) -> None:
    assert trained(family, tmp_path, capfd) == documented()[family]


def test_the_page_says_how_each_family_is_read() -> None:
    assert documented().keys() == set(causal_families())


@pytest.mark.sweep
def test_every_family_trains_as_documented(tmp_path: Path, capfd: Any) -> None:
    """Prints the table, whose cells are those of the page."""
    found = {}
    for family in causal_families():
        found[family] = trained(family, tmp_path, capfd)
        with capfd.disabled():
            print(f"| {family:<20} | {found[family]:<5} |", flush=True)
    assert found == documented()
