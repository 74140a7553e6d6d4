"""Figures of the importance ratios: their variance, and how much of it routing causes."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_rl.analysis.data.load import is_dense
from moe_rl.analysis.data.stats import bootstrap_interval
from moe_rl.analysis.plots import style
from moe_rl.analysis.verdicts.attribution import ROUTING, WEIGHT, sampled_updates, shares_by_run
from moe_rl.experiments.arms import arm_label


@style.styled
def ratio_variance(updates: pd.DataFrame) -> Figure:
    """Var(w) of token ratios and Var(s) of sequence ratios, mean over a rollout's updates, log."""
    arms = style.arms_in(updates)
    figure, panels = style.grid(2, columns=2, height=2.2)
    for axes, kind in zip(panels, ("token", "sequence"), strict=True):
        column = f"ratio/{kind}_var"
        drawn = [
            style.draw_arm(
                axes, style.per_step(updates, column), arm, "step", column, positive=True
            )
            for arm in arms
        ]
        axes.set_title(f"{kind} ratio")
        if any(drawn):
            style.log_axis(axes)
        else:
            style.say(axes, style.zero_text(updates))
    style.whole_numbers(panels[0])
    panels[0].set_ylabel("variance of the ratio")
    figure.supxlabel("rollout step", fontsize=8)
    style.legend(figure, arms)
    return figure


@style.styled
def routing_against_weights(updates: pd.DataFrame) -> Figure:
    """The two parts of Var(log w) over time on one log scale, and the routing share by arm."""
    sampled = sampled_updates(updates)
    arms = style.arms_in(updates)
    figure, panels = style.grid(3, columns=3, height=2.2, sharex=False, sharey=False)
    for axes, column, title in (
        (panels[0], ROUTING, "Var of routing part"),
        (panels[1], WEIGHT, "Var of weight part"),
    ):
        _part(axes, sampled, column, arms)
        axes.set_title(title)
        style.step_axis(axes)
    _same_log_range(panels[:2])
    _shares(panels[2], sampled, arms)
    style.legend(figure, arms)
    return figure


def _part(axes: Axes, sampled: pd.DataFrame, column: str, arms: list[str]) -> None:
    drawn = [
        arm for arm in arms if style.draw_arm(axes, sampled, arm, "step", column, positive=True)
    ]
    if not drawn:
        style.say(axes, style.zero_text(sampled))
        return
    style.log_axis(axes)
    style.whole_numbers(axes)
    zero = [arm for arm in arms if arm not in drawn and (sampled["arm"] == arm).any()]
    if zero:
        dense = all(is_dense(sampled[sampled["arm"] == arm]) for arm in zero)
        why = "0 by construction" if dense else "0 throughout"
        style.footnote(axes, f"{', '.join(arm_label(arm) for arm in zero)}: {why}")


def _same_log_range(panels: list[Axes]) -> None:
    """Parts are compared, so they share their scale; extra room on top for the note."""
    drawn = [axes for axes in panels if axes.get_yscale() == "log"]
    if drawn:
        low = min(axes.get_ylim()[0] for axes in drawn)
        high = max(axes.get_ylim()[1] for axes in drawn)
        for axes in drawn:
            axes.set_ylim(low, high * (high / low) ** 0.1)


def _shares(axes: Axes, sampled: pd.DataFrame, arms: list[str]) -> None:
    """Routing share of Var(log w): seeds as dots, IQM with its interval as a bar."""
    by_run = shares_by_run(sampled)
    axes.set_title("routing share of Var(log w)")
    if by_run.empty:
        style.say(axes, "not measured")
        return
    shown = [arm for arm in arms if (by_run["arm"] == arm).any()]
    for row, arm in enumerate(shown):
        seeds = by_run.loc[by_run["arm"] == arm, "routing_share"]
        total = bootstrap_interval(seeds)
        axes.plot(
            seeds, np.full(len(seeds), row), "o", markersize=3, alpha=0.5, color=style.colour(arm)
        )
        axes.plot(
            [total.low, total.high], [row, row], color=style.colour(arm),
            linewidth=3, alpha=0.6, solid_capstyle="butt",
        )  # fmt: skip
        axes.plot([total.value], [row], "|", markersize=10, color=style.INK)
    axes.axvline(0.5, color=style.MUTED, linewidth=0.7, linestyle=":")
    axes.set_yticks(range(len(shown)), [arm_label(arm) for arm in shown])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    low, high = axes.get_xlim()
    axes.set_xlim(min(-0.03, low), max(1.03, high))
    axes.set_xlabel("share (IQM, 95%)")
    axes.grid(visible=False, axis="y")
