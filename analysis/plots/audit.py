"""The figures of an audit, from the rows of its audit.json alone."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from moe_rl.analysis.plots import style
from moe_rl.metrics.published import DENSE_KL, MOE_KL

Rows = Sequence[Mapping[str, Any]]
PUBLISHED = ((DENSE_KL, "dense 8B"), (MOE_KL, "MoE 30B"))

_LINES = (
    ("#0072b2", "-", "o"),
    ("#d55e00", "--", "s"),
    ("#009e73", "-.", "^"),
    ("#b7589a", ":", "D"),
    ("#6a51a3", (0, (5, 1, 1, 1)), "v"),
    ("#b08a00", (0, (3, 1)), "P"),
    ("#6d6d6d", (0, (1, 1)), "X"),
)
_LIVE, _REPLAYED = "#d55e00", "#0072b2"


@style.styled
def kl_of_rows(rows: Rows) -> Figure:
    """KL (k3) of every reading, by its own routes and by the reference's, on a log axis.

    The leftmost place stands for 0.
    """
    figure = Figure(figsize=(style.WIDE, 0.7 + 0.22 * len(rows)), layout="constrained")
    axes = figure.subplots()
    pairs = [(_kl(row["live"]), _kl(row["replayed"])) for row in rows]
    known = [value for pair in pairs for value in pair if value is not None and value > 0]
    floor = 10.0 ** (math.floor(math.log10(min(known, default=1e-9))) - 1)
    for place, (live, replayed) in enumerate(pairs):
        y = len(rows) - 1 - place
        ends = [max(value, floor) for value in (live, replayed) if value is not None]
        axes.plot(ends, [y] * len(ends), color=style.GHOST, linewidth=1.2, zorder=1)
        for value, colour, mark in ((replayed, _REPLAYED, "D"), (live, _LIVE, "o")):
            if value is not None:
                axes.plot(max(value, floor), y, mark, color=colour, markersize=4.5, zorder=2)
    axes.set_xscale("log")
    high = max([*known, PUBLISHED[-1][0]], default=1.0)
    axes.set_xlim(floor * 0.7, high * 4)
    for value, name in PUBLISHED:
        axes.axvline(value, color=style.MUTED, linewidth=0.8, linestyle=":", zorder=0)
        axes.text(
            value, len(rows) - 0.35, name, ha="right" if value < 1e-3 else "left",
            va="bottom", fontsize=6.5, color=style.MUTED,
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), [str(row["name"]) for row in rows][::-1])
    axes.set_ylim(-0.6, len(rows) - 0.1)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("KL (k3), nats a token")
    ticks = [tick for tick in axes.get_xticks() if floor * 5 < tick <= high * 4]
    axes.set_xticks([floor, *ticks], ["0", *(style.plain_number(tick) for tick in ticks)])
    axes.minorticks_off()
    for colour, mark, label in (
        (_LIVE, "o", "own routes"),
        (_REPLAYED, "D", "the reference's routes"),
    ):
        axes.plot([], [], mark, color=colour, markersize=4.5, label=label)
    figure.legend(loc="outside upper right", ncols=2, handlelength=1.0)
    return figure


@style.styled
def routers_of_rows(rows: Rows) -> Figure:
    """Share of routers that differ, by layer and by position in the response."""
    figure, panels = style.grid(2, columns=2, height=2.2, sharex=False)
    for row, look in zip(rows, _looks(rows), strict=True):
        layers = row["routers_by_layer"]
        panels[0].plot(range(len(layers)), layers, label=row["name"], **look)
        bins = row["routers_by_position"]
        panels[1].plot([(a + b) / 2 for a, b, _ in bins], [share for *_, share in bins], **look)
    for axes, label in zip(panels, ("MoE layer", "response position"), strict=True):
        axes.set_xlabel(label)
        style.whole_numbers(axes)
        axes.set_ylim(bottom=0)
    panels[0].set_ylabel("routers that differ")
    style.percent_axis(panels[0])
    figure.legend(loc="outside upper center", ncols=min(len(rows), 4))
    return figure


@style.styled
def flips_of_rows(rows: Rows, unit: str) -> Figure:
    """Share of routers that differ against the reference's margin, in tenths of all pairs."""
    figure = Figure(figsize=(style.COLUMN, 2.5), layout="constrained")
    axes = figure.subplots()
    for row, look in zip(rows, _looks(rows), strict=True):
        points = [(margin, share) for margin, share in row["flips_by_margin"] if margin > 0]
        if points:
            axes.plot(*zip(*points, strict=True), label=row["name"], **look)
    axes.set_xscale("log")
    _plain_ticks(axes)
    axes.set_xlabel(f"router margin ({unit})")
    axes.set_ylabel("routers that differ")
    axes.set_ylim(bottom=0)
    style.percent_axis(axes)
    axes.legend()
    return figure


def _plain_ticks(axes: Axes) -> None:
    low, high = axes.get_xlim()
    subs = (1.0,) if high / low > 100 else (1.0, 2.0, 5.0)
    axes.xaxis.set_major_locator(LogLocator(subs=subs))
    axes.xaxis.set_major_formatter(FuncFormatter(style.plain_number))
    axes.minorticks_off()


def _looks(rows: Rows) -> list[dict[str, Any]]:
    return [
        {"color": colour, "linestyle": dash, "marker": mark, "markersize": 3, "linewidth": 1.4}
        for colour, dash, mark in (_LINES[number % len(_LINES)] for number in range(len(rows)))
    ]


def _kl(distance: Mapping[str, float] | None) -> float | None:
    return None if distance is None else distance["kl_k3"]
