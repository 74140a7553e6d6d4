"""How much disagreement between rollout engine and trainer an arm stands, beside real systems."""

import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from moe_rl.analysis.data.load import KEYS
from moe_rl.analysis.plots import style
from moe_rl.analysis.plots.noise import noise_ladder
from moe_rl.metrics.published import DENSE_KL, MOE_KL, MOE_ROUTERS, VLLM_ROUTERS

ROUNDING = 1e-9  # nats: what float32 alone makes
KL, ROUTERS = "mismatch/kl_k3", "mismatch/router_disagreement"
# Place on the axis and name; in each panel from left to right.
MARKS = {
    KL: ((DENSE_KL, "dense 8B [R3], vLLM bf16"), (MOE_KL, "30B MoE [R3]")),
    ROUTERS: ((VLLM_ROUTERS, "vLLM bf16"), (MOE_ROUTERS, "30B MoE [R3]")),
}


@style.styled
def tolerance(steps: pd.DataFrame, measures: pd.DataFrame) -> Figure:
    """Final reward against KL (k3) and against the share of routers that differ, by noise.

    Both are those of the first rollout, where engine and trainer have equal weights. Dots are
    seeds, lines join the medians.
    """
    ladder = noise_ladder(measures)
    first = steps[steps["step"] == 0][[*KEYS, KL, ROUTERS]]
    table = ladder.merge(first, on=KEYS)
    arms = style.arms_in(table)
    figure, panels = style.grid(2, columns=2, height=2.6, sharex=False)
    for axes, column, title in (
        (panels[0], KL, "KL (k3) between engine and trainer, nats a token"),
        (panels[1], ROUTERS, "routers that differ"),
    ):
        # One place a noise, of arms that replay nothing: their first rollouts differ by chance
        # alone, and replay takes away what is to be measured.
        live = table[table["routing_replay"] == "disabled"]
        if set(live["router_noise"]) != set(table["router_noise"]):
            live = table  # no such arm has run at some noise
        places = live.groupby("router_noise")[column].mean()
        if column == KL:
            places = _on_log_axis(axes, places)
        else:
            axes.set_xlim(-0.04, 1)
            axes.xaxis.set_major_formatter(FuncFormatter(style.percent))
        for arm in arms:
            own = table[table["arm"] == arm]
            style.draw_response(axes, own["router_noise"].map(places), own["final"], arm)
        _marks(axes, MARKS[column])
        axes.set_xlabel(title)
        axes.set_ylim(-0.03, 1.24)
        axes.set_yticks(np.linspace(0, 1, 6))
    panels[0].set_ylabel("final reward")
    style.legend(figure, arms)
    return figure


def _on_log_axis(axes: Axes, places: pd.Series) -> pd.Series:
    """Make the axis logarithmic, with a tick "none" at its left end for what is rounding alone."""
    decades = range(math.floor(math.log10(places[places > ROUNDING].min())), 1)
    none = 10.0 ** (decades[0] - 1)
    axes.set_xscale("log")
    axes.set_xticks(
        [none, *(10.0**decade for decade in decades)],
        ["none", *(f"$10^{{{decade}}}$" for decade in decades)],
    )
    axes.minorticks_off()
    return places.where(places > ROUNDING, none)


def _marks(axes: Axes, marks: tuple[tuple[float, str], ...]) -> None:
    """Vertical lines at what real systems were measured to differ by."""
    for number, (place, name) in enumerate(marks):
        axes.axvline(place, color=style.MUTED, linewidth=0.7, linestyle=(0, (2, 2)), zorder=0)
        axes.annotate(
            name,
            (place, 1.22 - 0.07 * number),
            xytext=(2, 0),
            textcoords="offset points",
            fontsize=6,
            color=style.MUTED,
            va="top",
            bbox={"facecolor": style.PAPER, "edgecolor": "none", "pad": 0.5},
        )
