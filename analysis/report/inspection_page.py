"""The page of one recorded batch: what stands out, its ratios and their tails, its routes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from moe_rl.analysis.plots import inspection as plots
from moe_rl.analysis.report.page import number, render, share
from moe_rl.analysis.report.svg import save_figures

# Level -> CSS class and mark: never by colour alone.
_LEVELS = {
    "wrong": ("no", "\u2717 wrong"),
    "look": ("open", "? look"),
    "good": ("yes", "\u2713 good"),
}
_PASSED = {True: "pass", False: "FAIL", None: "\u2013"}


def write_inspection_page(
    out: Path,
    found: dict[str, Any],
    *,
    name: str,
    beside: Mapping[str, dict[str, Any]] | None = None,
) -> Path:
    """Write `out`/index.html and its figures from what inspection.json holds; returns the page.

    `beside` are other inspections, by name, that this one is drawn beside. The same inspections
    give byte for byte the same files.
    """
    drawn = []
    if found["scatter"]:
        drawn.append(
            ("scatter", "Engine and trainer", plots.engine_against_trainer(found["scatter"]))
        )
    if found["by_layer"]:
        drawn.append(("layers", "Routers that differ", plots.routers_by_layer(found["by_layer"])))
    if found["pairs"]:
        drawn.append(("tails", "How far ratios go", plots.tails(found["pairs"])))
    if "branch/negative_above" in found["metrics"] and not found["history"]:
        drawn.append(("branches", "Where a gradient comes from", plots.branches(found["metrics"])))
    if found["history"]:
        drawn.append(("history", "What was logged", plots.history(found["history"])))
    if beside:
        together = plots.side_by_side({**beside, out.name: found})
        drawn.append(("beside", "Beside other batches", together))
    context = {
        "name": name,
        "found": found,
        "figures": save_figures(out / "figures", drawn),
        "findings": [_finding(one) for one in found["findings"]],
        "pairs": [_pair(pair) for pair in found["pairs"]],
        "laws": [[law["check"], _PASSED[law["passed"]], law["reason"]] for law in found["laws"]],
        "metrics": [[key, number(value, 4)] for key, value in found["metrics"].items()],
    }
    index = out / "index.html"
    index.write_text(render(context, "inspection.html.j2"), encoding="utf-8")
    return index


def _finding(one: dict[str, str]) -> list[str]:
    kind, mark = _LEVELS[one["level"]]
    return [Markup('<span class="verdict {}">{}</span>').format(kind, mark), one["words"]]


def _pair(pair: dict[str, Any]) -> list[str]:
    survival, extreme = dict(pair["survival"]), dict(pair["extreme"])
    return [
        pair["name"],
        str(pair["tokens"]),
        f"{number(pair['mean'], 4)} \u00b1 {number(pair['mean_error'], 4)}",
        share(extreme[2.0], 2),
        share(survival[10.0], 2),
        number(pair["largest"]),
    ]
