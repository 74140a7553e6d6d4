"""Churn and disagreement by layer and by position."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moe_rl.analysis.plots.style import WIDE, styled

LINES = (("churn", "#0072b2", "o"), ("routers", "#d55e00", "s"), ("tokens", "#009e73", "^"))


@styled
def churn_of_traces(
    by_layer: np.ndarray, bins: list[tuple[int, int]], by_position: np.ndarray
) -> Figure:
    """Left: churn and router disagreement by MoE layer `[L, 2]`. Right: with token disagreement,
    by position `[bins, 3]`, each point at the middle of its bin."""
    figure = Figure(figsize=(WIDE, 0.36 * WIDE), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    middles = [(first + last) / 2 for first, last in bins]
    for axes, x, columns, label in (
        (left, np.arange(len(by_layer)), by_layer, "MoE layer"),
        (right, np.array(middles), by_position, "position"),
    ):
        for (name, colour, mark), values in zip(LINES, columns.T, strict=False):
            axes.plot(x, 100 * values, color=colour, marker=mark, markersize=3, label=name)
        axes.set_xlabel(label)
        axes.grid(axis="y", alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.set_ylabel("share that differs (%)")
    left.set_ylim(bottom=0)
    right.legend()
    return figure
