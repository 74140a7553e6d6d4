"""The page of an audit: what was measured of one checkpoint, and what it means, in words."""

from pathlib import Path
from typing import Any

from moe_rl.analysis.plots import audit as plots
from moe_rl.analysis.report.page import number, render, share
from moe_rl.analysis.report.svg import save_figures

_MOVED = ("engine", "trace", "numerics")


def write_audit_page(out: Path, audit: dict[str, Any]) -> Path:
    """Write `out`/index.html and its figures from what audit.json holds; returns the page's path.

    The same audit gives byte for byte the same files.
    """
    rows = audit["rows"]
    moved = [row for row in rows if row["kind"] in _MOVED and row["router_disagreement"] > 0]
    drawn = [("kl", "How far log-probs are", plots.kl_of_rows(rows))]
    if moved:
        drawn.append(("routers", "Where routers differ", plots.routers_of_rows(moved)))
    flipping = [row for row in moved if row["flips_by_margin"]]
    if flipping:
        unit = audit["margin_unit"]
        drawn.append(("margins", "Near ties flip", plots.flips_of_rows(flipping, unit)))
    figures = save_figures(out / "figures", drawn)
    context = {"audit": audit, "figures": figures, "rows": [_cells(row) for row in rows]}
    index = out / "index.html"
    index.write_text(render(context, "audit.html.j2"), encoding="utf-8")
    return index


def _cells(row: dict[str, Any]) -> list[str]:
    live, replayed = row["live"], row["replayed"]
    return [
        row["name"],
        share(row["router_disagreement"], 2),
        share(row["token_disagreement"], 1),
        share(row["churn"], 2),
        number(live["kl_k1"]),
        f"{number(live['kl_k3'])} \u00b1 {number(live['kl_k3_error'])}",
        "" if replayed is None else number(replayed["kl_k3"]),
        "" if replayed is None else share(row["removed"], 1),
        share(live["extreme_2"], 2),
        number(live["largest"], 3),
    ]
