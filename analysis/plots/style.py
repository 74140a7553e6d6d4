"""The look that all figures share: colours, axes, legends and number formats.

Figures are built on `Figure` objects, never on pyplot: no backend is chosen and no global state
is touched. Every arm has one colour and one dash everywhere (Okabe and Ito's colours, safe for the
common kinds of colour blindness; the dash is the second channel). Every seed is a thin line, the
median over seeds a thick one. COLUMN and WIDE are the column widths of a two-column paper in
inches.
"""

import textwrap
from typing import Any, Literal

import matplotlib.style as mpl_style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from moe_rl.experiments.arms import (
    ARMS,
    SPARE_COLOURS,
    STORY_ARMS,
    arm_key,
    arm_label,
    find_arm,
)

COLUMN = 3.4
WIDE = 7.0

MOST_POINTS = 64  # of a line, whose ups and downs can still be seen
MOST_LINES = 8  # arms in one panel; more cannot be told apart
LEAD_ARMS = (*STORY_ARMS, "grpo+dual-clip", "grpo+rollout-old")
"""The arms that a panel of lines keeps where a study has more than `MOST_LINES`."""

# Colours that the page swaps for their dark-mode partners: see svg.py.
INK, MUTED, GHOST, GRID, PAPER = "#1b1e23", "#59616b", "#c3c9d0", "#e3e6ea", "#fdfdfc"
# light colour -> dark partner; the page's CSS variable is named after the light one
DARK_PARTNERS = (
    {INK: "#e8eaed", MUTED: "#a3abb5", GHOST: "#4a525c", GRID: "#2a3037", PAPER: "#14171b"}
    | {arm.colour: arm.dark_colour for arm in ARMS.values()}
    | dict(SPARE_COLOURS)
    # The branches of the gradient: red for A < 0, blue for A > 0, the strong ones beyond the clip.
    | {"#b3261e": "#ff6f61", "#e3a8a0": "#8f4a43", "#f2d6d2": "#553330"}
    | {"#2f5f8f": "#7fb2e5", "#9dbbd8": "#44698d", "#cfdfee": "#2c4156"}
)
CMAP = "cividis"  # perceptually even and safe for colour blindness

RC = {
    "font.family": "DejaVu Sans",  # ships with matplotlib, so figures agree between machines
    "font.size": 8,
    "axes.titlesize": 8,
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
}

# A decorator: matplotlib's defaults overlaid with RC while the function runs, whatever the user's
# matplotlibrc says; matplotlib's own settings are the same afterwards.
styled = mpl_style.context(RC, after_reset=True)


def colour(arm: str) -> str:
    """The arm's colour on a light page."""
    return find_arm(arm).colour


def line_style(arm: str) -> dict[str, Any]:
    """Colour and dash of the arm's lines, as arguments of matplotlib."""
    return {"color": find_arm(arm).colour, "linestyle": find_arm(arm).dash}


def arms_in(frame: pd.DataFrame) -> list[str]:
    """The arms of a frame in the fixed order."""
    return sorted(frame["arm"].unique(), key=arm_key)


def lead_arms(arms: list[str], most: int = MOST_LINES) -> list[str]:
    """All arms, or the main ones of more than `most`: lines that can be told apart."""
    if len(arms) <= most:
        return arms
    return [arm for arm in arms if arm in LEAD_ARMS] or arms[:most]


def wrapped(text: str, width: int) -> str:
    """A title in lines of at most `width` characters, so that it keeps to its panel.

    Lines end at spaces and behind underscores.
    """
    lines = textwrap.fill(text.replace("_", "_ "), width, break_on_hyphens=False)
    return lines.replace("_ ", "_")


def has(frame: pd.DataFrame, *columns: str) -> bool:
    """Whether every column was recorded at least once."""
    return all(name in frame.columns and bool(frame[name].notna().any()) for name in columns)


def grid(
    panels: int,
    *,
    columns: int,
    height: float | list[float],
    sharex: bool | Literal["row"] = True,
    sharey: bool | Literal["row"] = True,
) -> tuple[Figure, list[Axes]]:
    """A wide figure of `panels` axes, at most `columns` a row.

    Axes left over in the last row are removed.

    Args:
        height: inches of every row, or a list with one height a row.
    """
    per_row = min(columns, panels)
    rows = -(-panels // per_row)
    heights = height if isinstance(height, list) else [height] * rows
    figure = Figure(figsize=(WIDE, sum(heights) + 0.35), layout="constrained")
    made = figure.subplots(
        rows, per_row, sharex=sharex, sharey=sharey, height_ratios=heights, squeeze=False
    )
    axes: list[Axes] = list(made.flat)
    for index in range(panels, len(axes)):
        axes[index].remove()
        if index >= per_row:
            axes[index - per_row].tick_params(labelbottom=True)
    return figure, axes[:panels]


def per_step(updates: pd.DataFrame, column: str) -> pd.DataFrame:
    """Mean of `column` over the updates of every rollout: columns arm, seed, step, `column`."""
    values = updates[["arm", "seed", "step", column]].astype({column: float})
    return values.groupby(["arm", "seed", "step"], as_index=False)[column].mean()


def draw_arm(
    axes: Axes, frame: pd.DataFrame, arm: str, x: str, y: str, *, positive: bool = False
) -> bool:
    """Thin line for every seed and thick median of an arm's complete seeds (of all if none is).

    False where nothing can be drawn. A point of a long line is the mean of several.

    `positive` drops values that a log axis cannot show (0 and non-finite).
    """
    own = frame[frame["arm"] == arm]
    table = own.pivot(index=x, columns="seed", values=y).astype(float)
    table, width = in_blocks(table, frame[x])
    if positive:
        table = table.where(table > 0)
    # The median counts an infinite value, which no line can show, as larger than all others.
    complete = own[own["complete"].astype(bool)]["seed"].unique() if "complete" in own else []
    median = table[list(complete)].median(axis=1) if len(complete) else table.median(axis=1)
    table, median = table.where(np.isfinite(table)), median.where(np.isfinite(median))
    if table.empty or not table.notna().to_numpy().any():
        return False
    if table.shape[1] > 1:
        for seed in table.columns:
            axes.plot(table.index, table[seed], linewidth=0.6, alpha=0.45, color=colour(arm))
    if width > 1:
        axes.set_xlabel(f"means of {width}", fontsize=6.5, color=MUTED)
    axes.plot(table.index, median, solid_capstyle="round", **line_style(arm))
    return True


def draw_response(axes: Axes, x: pd.Series, y: pd.Series, arm: str) -> pd.Series:
    """A dot for every seed and a line that joins the medians of an arm, by place on the x axis.

    Returns the medians, by place.
    """
    axes.scatter(x, y, s=7, color=colour(arm), alpha=0.45, linewidths=0)
    medians = y.groupby(x).median()
    axes.plot(medians.index, medians, **line_style(arm))
    return medians


def in_blocks(table: pd.DataFrame, values: pd.Series) -> tuple[pd.DataFrame, int]:
    """The rows of a table, or their means over blocks of as few as leave `MOST_POINTS`.

    Args:
        values: of the index, in all lines of a panel, so that they have blocks in common.

    Returns:
        The table, by the middle of each block, and how many places a block has.
    """
    places = np.unique(values)
    width = -(-len(places) // MOST_POINTS)
    if width <= 1:
        return table, 1
    block = pd.Series(np.arange(len(places)) // width, index=places)
    own = block.reindex(table.index).to_numpy()
    means = table.where(np.isfinite(table)).groupby(own).mean()
    middles = block.index.to_series().groupby(block.to_numpy()).mean()
    return means.set_axis(middles[means.index], axis=0), width


def line_figure(
    frame: pd.DataFrame, x: str, y: str, label: str, x_label: str = "rollout step",
    *, log: bool = False,
) -> tuple[Figure, Axes, list[str]]:  # fmt: skip
    """One panel, as wide as a column, of every arm's `y` against `x`.

    The last value holds the labels of the arms that have nothing to draw.
    """
    arms = arms_in(frame)
    figure = Figure(figsize=(COLUMN, 2.3), layout="constrained")
    axes = figure.add_subplot()
    drawn = [arm for arm in arms if draw_arm(axes, frame, arm, x, y, positive=log)]
    if log and drawn:
        log_axis(axes)
    axes.set_ylabel(label)
    step_axis(axes, x_label)
    legend(figure, arms)
    return figure, axes, [arm_label(arm) for arm in arms if arm not in drawn]


def seed_places(row: int, count: int) -> NDArray[np.float64]:
    """Heights in a row of a panel at which the dots of an arm's seeds stand, one below the other.

    Seeds that end at the same reward, most of all at 0, would hide each other.
    """
    return row + (np.linspace(-0.27, 0.27, count) if count > 1 else np.zeros(count))


def dot(label: str, **look: Any) -> Line2D:
    """A dot for a legend."""
    return Line2D([], [], label=label, linestyle="", marker="o", markersize=3.5, **look)


def legend(figure: Figure, arms: list[str]) -> None:
    """One legend above the figure, arms in their order."""
    handles = [Line2D([], [], label=find_arm(arm).label, **line_style(arm)) for arm in arms]
    figure.legend(
        handles=handles, loc="outside upper center", ncols=_legend_columns(figure, arms),
        handlelength=2.2, columnspacing=1.2, borderaxespad=0.2,
    )  # fmt: skip


def _legend_columns(figure: Figure, arms: list[str]) -> int:
    """The most columns in which the arms' labels fit the figure's width; matplotlib cuts them."""
    # Inches: the line with its spaces, and a letter of DejaVu Sans at 7.5 points.
    widths = [0.45 + 0.063 * len(arm_label(arm)) for arm in arms]
    for columns in range(len(arms), 1, -1):
        # matplotlib fills column by column, the first ones longer where it does not divide.
        split = np.array_split(widths, columns)
        if sum(max(column) for column in split) <= figure.get_figwidth():
            return columns
    return 1


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


def plain_number(value: float, _position: int | None = None, *, digits: int = 0) -> str:
    """0.001 to 1000 as they are, beyond as (2 times) 10 with a raised exponent; no math fonts.

    `digits` are the decimals of the factor.
    """
    if value <= 0:
        return ""
    if 0.000999 < value < 1001:
        return f"{value:g}"
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    times = "" if mantissa == "1" else f"{mantissa}\u00b7"
    return f"{times}10{str(int(exponent)).translate(RAISED)}"


def short_number(value: float) -> str:
    """A setting as one writes it: 3.5e-4, not 0.00035."""
    if value == 0 or abs(value) >= 0.01:
        return f"{value:g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def colour_bar(figure: Figure, image: Any, panels: list[Axes], text: str, tick: Any = None) -> None:
    """One colour bar for all panels, at the right."""
    bar: Any = figure.colorbar(image, ax=panels, shrink=0.8, pad=0.02, format=tick, aspect=25)
    bar.set_label(text)
    bar.outline.set_visible(False)
    bar.solids.set_rasterized(True)  # as paths its 256 steps show hairlines in browsers


def step_axis(axes: Axes, text: str = "rollout step") -> None:
    """Integer ticks on x with a label, beside what `draw_arm` has said there."""
    axes.set_xlabel(", ".join(filter(None, (text, axes.get_xlabel()))))
    whole_numbers(axes)


def whole_numbers(axes: Axes) -> None:
    """At most five ticks on x, all of them integers."""
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True, steps=[1, 2, 5, 10]))


def zero_text(updates: pd.DataFrame) -> str:
    """Why a quantity that compares old and new policy is 0 in every row."""
    if len(updates) and int(updates["update"].max()) == 0:
        return "0 by construction:\none update per rollout"
    return "0 throughout"


def percent(value: float, _position: int | None = None) -> str:
    """A share as a percentage of three digits."""
    return f"{100 * value:.3g}%"


def percent_axis(axes: Axes) -> None:
    """Shares on y as percentages."""
    axes.yaxis.set_major_formatter(FuncFormatter(percent))


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
