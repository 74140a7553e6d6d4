"""Analysis room, figures: the one look they share.

Figures are built on `Figure` objects, never on pyplot: no backend is chosen and no global state
is touched. Every arm has one colour and one dash everywhere (Okabe and Ito's colours, safe for the
common kinds of colour blindness; the dash is the second channel). Every seed is a thin line, the
median over seeds a thick one. COLUMN and WIDE are the column widths of a two-column paper in
inches; at COLUMN the text stays legible on a phone.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any, TypeVar

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from moe_rl.analysis.arms import arm_key, arm_label

COLUMN = 3.4
WIDE = 7.0

# Colours that the page swaps for their dark-mode partners: see svg.py.
INK, MUTED, GHOST, GRID, PAPER = "#1b1e23", "#59616b", "#c3c9d0", "#e3e6ea", "#fdfdfc"
ARM_COLOURS = {
    "grpo": "#d55e00",
    "grpo+replay": "#0072b2",
    "gspo": "#009e73",
    "gspo+replay": "#3d9bd4",
    "dense": "#6d6d6d",
    "frozen-router": "#b7589a",
    "grpo-restart": "#a6761d",
    "grpo-restart-full-rate": "#8c2d04",
}
SPARE_COLOURS = ["#7570b3", "#4d4d00", "#1b6f6f"]
DASHES: dict[str, Any] = {
    "gspo+replay": (0, (4, 1.5)),
    "dense": (0, (1, 1)),
    "frozen-router": (0, (5, 1, 1, 1)),
    "grpo-restart": (0, (4, 1.5)),
    "grpo-restart-full-rate": (0, (1, 1)),
}
CMAP = "cividis"  # perceptually even and safe for colour blindness

RC = {
    "font.family": "DejaVu Sans",  # ships with matplotlib, so figures agree between machines
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.titleweight": "normal",
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.9,
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
    "savefig.facecolor": PAPER,
    "svg.fonttype": "none",
    "svg.hashsalt": "moe-rl",  # ids in the SVG become a function of the drawing
    "axes.unicode_minus": True,
}

Draw = TypeVar("Draw", bound=Callable[..., Figure])


def style_context() -> AbstractContextManager[None]:
    """matplotlib's defaults overlaid with RC, whatever the user's matplotlibrc says."""
    settings: Any = {name: mpl.rcParamsDefault[name] for name in _DRAWN} | RC
    return mpl.rc_context(settings)


# The families of settings that change a drawing; "backend" and the like are none of our business.
_FAMILIES = {
    "axes", "figure", "font", "grid", "hatch", "image", "legend", "lines", "markers", "patch",
    "path", "savefig", "svg", "text", "xtick", "ytick",
}  # fmt: skip
_DRAWN = [name for name in mpl.rcParamsDefault if name.split(".")[0] in _FAMILIES]


def styled(draw: Draw) -> Draw:
    """Run a drawing function under RC, leaving matplotlib's own settings as they were."""

    @wraps(draw)
    def wrapper(*args: Any, **kwargs: Any) -> Figure:
        with style_context():
            return draw(*args, **kwargs)

    return wrapper  # type: ignore[return-value]


def colour(arm: str) -> str:
    """The arm's colour; an unknown arm gets a spare one that depends on its name only."""
    return ARM_COLOURS.get(arm, SPARE_COLOURS[sum(arm.encode()) % len(SPARE_COLOURS)])


def arms_in(frame: pd.DataFrame) -> list[str]:
    """The arms of a frame in the fixed order."""
    return sorted(frame["arm"].unique(), key=arm_key)


def has(frame: pd.DataFrame, *columns: str) -> bool:
    """Whether every column was recorded at least once."""
    return all(name in frame.columns and bool(frame[name].notna().any()) for name in columns)


def grid(
    panels: int,
    width: float,
    *,
    columns: int,
    height: float,
    narrow_columns: int = 2,
    sharex: bool = True,
    sharey: bool = True,
) -> tuple[Figure, list[Axes]]:
    """A figure with `panels` axes, at most `columns` a row, `height` inches a row.

    Below WIDE there are at most `narrow_columns` a row.
    Axes left over in the last row are removed.
    """
    per_row = min(columns if width >= WIDE else narrow_columns, panels)
    rows = -(-panels // per_row)
    figure = Figure(figsize=(width, height * rows + 0.35), layout="constrained")
    made = figure.subplots(rows, per_row, sharex=sharex, sharey=sharey, squeeze=False)
    axes: list[Axes] = list(made.flat)
    for index in range(panels, len(axes)):
        axes[index].remove()
        above = axes[index - per_row] if index >= per_row else None
        if above is not None:
            above.tick_params(labelbottom=True)
    return figure, axes[:panels]


def single(width: float, height: float = 2.3) -> tuple[Figure, Axes]:
    """A figure with one panel."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def per_step(updates: pd.DataFrame, column: str) -> pd.DataFrame:
    """Mean of `column` over the updates of every rollout: columns arm, seed, step, `column`."""
    values = updates[["arm", "seed", "step", column]].astype({column: float})
    return values.groupby(["arm", "seed", "step"], as_index=False)[column].mean()


def last_updates(updates: pd.DataFrame) -> pd.DataFrame:
    """The rows of every rollout's last update, where the policy is furthest from the old one."""
    last = updates.groupby(["arm", "seed", "step"])["update"].transform("max")
    return updates[updates["update"] == last]


def draw_arm(
    axes: Axes, frame: pd.DataFrame, arm: str, x: str, y: str, *, positive: bool = False
) -> bool:
    """Thin line for every seed and thick median of an arm's complete seeds (of all if none is).

    False where nothing can be drawn.

    `positive` drops values that a log axis cannot show (0 and non-finite).
    """
    own = frame[frame["arm"] == arm]
    table = own.pivot(index=x, columns="seed", values=y).astype(float)
    if positive:
        table = table.where(table > 0)
    # The median counts an infinite value, which no line can show, as larger than all others.
    complete = own[own["complete"].astype(bool)]["seed"].unique() if "complete" in own else []
    median = table[list(complete)].median(axis=1) if len(complete) else table.median(axis=1)
    table, median = table.where(np.isfinite(table)), median.where(np.isfinite(median))
    if table.empty or not table.notna().to_numpy().any():
        return False
    style = {"color": colour(arm), "linestyle": DASHES.get(arm, "-")}
    if table.shape[1] > 1:
        for seed in table.columns:
            axes.plot(table.index, table[seed], linewidth=0.6, alpha=0.45, color=colour(arm))
    axes.plot(table.index, median, solid_capstyle="round", **style)
    return True


def legend(figure: Figure, arms: list[str]) -> None:
    """One legend above the figure, arms in their order."""
    handles = [
        Line2D([], [], color=colour(arm), linestyle=DASHES.get(arm, "-"), label=arm_label(arm))
        for arm in arms
    ]
    widest = 6 if figure.get_figwidth() >= WIDE else 3
    per_row = len(arms) if len(arms) <= widest else widest // 2 + 1
    figure.legend(
        handles=handles, loc="outside upper center", ncols=per_row, handlelength=2.2,
        columnspacing=1.2, borderaxespad=0.2,
    )  # fmt: skip


def log_axis(axes: Axes) -> None:
    """Logarithmic y axis with plain labels; below two decades 2 and 5 are labelled too."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    decades = float(np.log10(high / low))
    if decades < 2:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    else:
        # Six labels fit a panel: every decade up to six, then every second, third, ...
        axes.yaxis.set_major_locator(LogLocator(numticks=6))
    axes.yaxis.set_major_formatter(FuncFormatter(plain_number))
    axes.yaxis.set_minor_formatter(NullFormatter())


RAISED = str.maketrans(
    "-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079"
)


def plain_number(value: float, _position: int | None = None) -> str:
    """0.001 to 1000 as they are, beyond as (2 times) 10 with a raised exponent; no math fonts."""
    if value <= 0:
        return ""
    if 0.000999 < value < 1001:
        return f"{value:g}"
    mantissa, exponent = f"{value:.0e}".split("e")
    times = "" if mantissa == "1" else f"{mantissa}\u00b7"
    return f"{times}10{str(int(exponent)).translate(RAISED)}"


def colour_bar(figure: Figure, image: Any, panels: list[Axes], text: str, tick: Any = None) -> None:
    """One colour bar for all panels: at the right, below them on a narrow figure."""
    narrow = figure.get_figwidth() < WIDE
    place: Any = (
        {"location": "top", "aspect": 30} if narrow else {"location": "right", "aspect": 25}
    )
    bar: Any = figure.colorbar(image, ax=panels, shrink=0.8, pad=0.02, format=tick, **place)
    bar.set_label(text)
    bar.outline.set_visible(False)
    bar.solids.set_rasterized(True)  # as paths its 256 steps show hairlines in browsers


def step_axis(axes: Axes, text: str = "rollout step") -> None:
    """Integer ticks on x with a label."""
    axes.set_xlabel(text)
    whole_numbers(axes)


def whole_numbers(axes: Axes) -> None:
    """At most six ticks on x, all of them integers."""
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))


def zero_text(updates: pd.DataFrame) -> str:
    """Why a quantity that compares old and new policy is 0 in every row."""
    if len(updates) and int(updates["update"].max()) == 0:
        return "0 by construction:\none update per rollout"
    return "0 throughout"


def percent_axis(axes: Axes) -> None:
    """Shares on y as percentages."""
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))


def say(axes: Axes, text: str) -> None:
    """Words in the middle of an empty panel: why there is nothing to draw; no scale beside it."""
    axes.tick_params(left=False, labelleft=False)
    axes.grid(visible=False)
    axes.text(
        0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=MUTED,
        fontsize=7, wrap=True,
    )  # fmt: skip


def footnote(axes: Axes, text: str) -> None:
    """A small note under the title, inside the axes at the top left."""
    axes.text(
        0.02, 0.98, text, transform=axes.transAxes, ha="left", va="top", color=MUTED, fontsize=6.5
    )
