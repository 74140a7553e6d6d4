"""Where each arm is stable, and how far it can be pushed."""

from functools import partial
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from moe_rl.analysis.data.collapse import STABLE_DRAWDOWN, stability_frontier
from moe_rl.analysis.plots import style
from moe_rl.experiments.arms import arm_label

CELL_KEYS = ["arm", "router_noise", "updates_per_rollout", "learning_rate"]

TITLE = 84
"""Characters that the titles of one row of panels have together."""


def map_cells(measures: pd.DataFrame) -> pd.DataFrame:
    """The map: one row an (arm, noise, updates a rollout, learning rate), over complete runs.

    Columns: `final`, `peak`, `drawdown` (medians over seeds), `unstable` (median drawdown above
    20%), `collapsed` and `seeds` (counts). `measures` is `run_measures(study)`.
    """
    done = measures[measures["complete"]]
    cells = done.groupby(CELL_KEYS, as_index=False).agg(
        final=("final", "median"),
        peak=("peak", "median"),
        drawdown=("drawdown", "median"),
        collapsed=("collapsed", "sum"),
        seeds=("seed", "nunique"),
    )
    cells["unstable"] = cells["drawdown"] > STABLE_DRAWDOWN
    return cells


@style.styled
def collapse_map(measures: pd.DataFrame) -> Figure:
    """Final reward over learning rate and updates per rollout, one panel an arm and noise.

    Colour and number: median final reward over seeds; small number: seeds; a cross in the corner:
    the median drawdown exceeds 20%.
    """
    cells = map_cells(measures)
    arms, noises = style.arms_in(cells), sorted(cells["router_noise"].unique())
    rates = sorted(cells["learning_rate"].unique())
    updates = sorted(cells["updates_per_rollout"].unique())
    panels_of = [(arm, noise) for arm in arms for noise in noises]
    columns = len(noises) if 1 < len(noises) <= 4 else 3
    # A level stays with its word: the space between them does not break.
    levels = [f", noise\u00a0{noise:g}" if len(noises) > 1 else "" for _, noise in panels_of]
    titles = [
        style.wrapped(arm_label(arm) + level, TITLE // columns)
        for (arm, _), level in zip(panels_of, levels, strict=True)
    ]
    height = 0.45 + 0.3 * len(updates) + 0.12 * max(title.count("\n") + 1 for title in titles)
    figure, panels = style.grid(len(panels_of), columns=columns, height=height)
    image: Any = None
    for axes, (arm, noise), title in zip(panels, panels_of, titles, strict=True):
        own = cells[(cells["arm"] == arm) & (cells["router_noise"] == noise)]
        image = _map_panel(axes, own, rates, updates)
        axes.set_title(title)
    style.colour_bar(figure, image, panels, "final reward (median over seeds)")
    figure.supxlabel("learning rate", fontsize=8)
    figure.supylabel("updates per rollout", fontsize=8)
    return figure


def _map_panel(axes: Axes, cells: pd.DataFrame, rates: list[float], updates: list[int]) -> Any:
    table = cells.pivot_table(index="updates_per_rollout", columns="learning_rate", values="final")
    table = table.reindex(index=updates, columns=rates)
    image = axes.imshow(
        table.to_numpy(float), origin="lower", aspect="auto", cmap=style.CMAP, vmin=0, vmax=1
    )
    axes.grid(visible=False)
    axes.set_xticks(range(len(rates)), [style.short_number(rate) for rate in rates])
    axes.set_yticks(range(len(updates)), [str(int(m)) for m in updates])
    axes.tick_params(length=0)
    if cells.empty:
        style.say(axes, "not run")
    for cell in cells.to_dict("records"):
        x, y = rates.index(cell["learning_rate"]), updates.index(cell["updates_per_rollout"])
        ink = _ink_on(cell["final"])
        write = partial(axes.text, ha="center", va="center", color=ink)
        write(x, y + 0.13, f"{cell['final']:.2f}", fontsize=7)
        write(x, y - 0.28, f"n={cell['seeds']}", fontsize=5)
        if cell["unstable"]:
            axes.plot([x - 0.38], [y + 0.27], marker="x", markersize=3.4, color=ink, mew=1.1)
    for x in range(1, len(rates)):
        axes.axvline(x - 0.5, color=style.PAPER, linewidth=1)
    for y in range(1, len(updates)):
        axes.axhline(y - 0.5, color=style.PAPER, linewidth=1)
    return image


def _ink_on(value: float) -> str:
    """Black or white, whichever reads on the colour of `value`; the same in light and dark."""
    red, green, blue, _ = mpl.colormaps[style.CMAP](float(np.clip(value, 0, 1)))
    return "#0a0a0a" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "#fefefe"


@style.styled
def frontier(measures: pd.DataFrame) -> Figure:
    """Stability frontier against updates per rollout, one panel a noise level.

    Line: frontier of the median drawdown; thin bar: range of the single seeds' frontiers; arrow
    up: stable at the highest learning rate tried; open circle below: not stable even at the lowest.
    """
    table = stability_frontier(measures[measures["complete"]])
    arms, noises = style.arms_in(table), sorted(table["router_noise"].unique())
    updates = sorted(table["updates_per_rollout"].unique())
    figure, panels = style.grid(len(noises), columns=3, height=2.3)
    for axes, noise in zip(panels, noises, strict=True):
        for index, arm in enumerate(arms):
            own = table[(table["arm"] == arm) & (table["router_noise"] == noise)]
            _frontier_line(axes, own, updates, arm, (index - (len(arms) - 1) / 2) * 0.11)
        axes.set_yscale("log")
        rates = sorted(measures["learning_rate"].unique())
        axes.set_yticks(rates, [style.short_number(rate) for rate in rates])
        axes.minorticks_off()
        axes.set_ylim(min(rates) / 2.2, max(rates) * 1.6)
        axes.set_xticks(range(len(updates)), [str(int(m)) for m in updates])
        axes.set_xlim(-0.5, len(updates) - 0.5)
        if len(noises) > 1:
            axes.set_title(f"router noise {noise:g}")
        axes.set_xlabel("updates per rollout")
    figure.supylabel("largest stable learning rate", fontsize=8)
    style.legend(figure, arms)
    mark = partial(Line2D, [], [], color=style.MUTED, linestyle="")
    handles = [
        mark(marker="^", label="stable at the highest tried"),
        mark(marker="o", mfc="none", label="stable nowhere"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=7)
    return figure


def _frontier_line(
    axes: Axes, own: pd.DataFrame, updates: list[int], arm: str, offset: float
) -> None:
    xs, ys = [], []
    for row in own.sort_values("updates_per_rollout").to_dict("records"):
        x = updates.index(row["updates_per_rollout"]) + offset
        nowhere = np.isnan(row["frontier"])
        floor = row["lowest"] / 1.6
        y = floor if nowhere else row["frontier"]
        low = row["seed_low"] if row["seed_low"] > 0 else floor
        axes.plot([x, x], [low, max(row["seed_high"], low)], color=style.colour(arm), linewidth=0.8)
        marker = "o" if nowhere or not row["censored"] else "^"
        face = "none" if nowhere else style.colour(arm)
        axes.plot(
            [x], [y], marker=marker, markersize=5, color=style.colour(arm), markerfacecolor=face
        )
        xs.append(x)
        ys.append(y)
    axes.plot(xs, ys, color=style.colour(arm), linewidth=1.2, alpha=0.8)
