"""Every arm of a study side by side, in every setting: reward over time and final reward."""

from typing import Literal

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from moe_rl.analysis.data.stats import bootstrap_interval
from moe_rl.analysis.plots import style
from moe_rl.analysis.plots.training import reward_panel
from moe_rl.experiments.arms import arm_label

ROW, COLUMNS = 0.17, 3  # inches an arm, panels side by side


@style.styled
def reward_side_by_side(steps: pd.DataFrame, settings: list[str]) -> Figure:
    """Reward against rollout step: a column an arm, a row a setting; of many arms the main ones.

    Thin lines are seeds, the thick one their median, a triangle marks a seed's collapse.
    """
    arms = style.lead_arms(style.arms_in(steps), most=len(style.LEAD_ARMS))
    count = len(arms) * len(settings)
    # One x axis for all panels only if every panel is drawn and all have equally many steps.
    shown = steps[steps["arm"].isin(arms)].groupby(["setting", "arm"])["step"].max()
    sharex: bool | Literal["row"] = True if len(shown) == count and shown.nunique() == 1 else "row"
    figure, panels = style.grid(count, columns=len(arms), height=1.35, sharex=sharex)
    for row, setting in enumerate(settings):
        own = steps[steps["setting"] == setting]
        labelled = False
        for axes, arm in zip(panels[row * len(arms) :], arms, strict=False):
            if (own["arm"] == arm).any():
                reward_panel(axes, own, arm, ghosts=[])
                axes.tick_params(labelleft=not labelled)
                labelled = True
            else:
                axes.spines[:].set_visible(False)
                axes.tick_params(bottom=False, labelbottom=False)
                style.say(axes, "not run")
            if row == 0:
                axes.set_title(style.wrapped(arm_label(arm), 17))
        style.whole_numbers(panels[row * len(arms)])
        if len(settings) > 1:
            panels[row * len(arms)].set_ylabel(style.wrapped(setting, 17))
    figure.supxlabel("rollout step", fontsize=8)
    figure.supylabel("reward", fontsize=8)
    return figure


@style.styled
def final_rewards(measures: pd.DataFrame, settings: list[str]) -> Figure:
    """Final reward of every complete seed, arms as rows in the order of their table.

    One panel a setting. Dots are seeds, open where the seed collapsed; the tick is the IQM, the bar
    its 95% bootstrap interval. The dotted line is GRPO's IQM.
    """
    done = measures[measures["complete"]]
    rows = [settings[first : first + COLUMNS] for first in range(0, len(settings), COLUMNS)]
    # A row of panels has the arms that were run in one of its settings.
    arms_of = [style.arms_in(done[done["setting"].isin(row)]) for row in rows]
    heights = [ROW * len(arms) + 0.45 for arms in arms_of]
    figure, panels = style.grid(len(settings), columns=COLUMNS, height=heights, sharey="row")
    for axes, (index, setting) in zip(panels, enumerate(settings), strict=True):
        arms, own = arms_of[index // COLUMNS], done[done["setting"] == setting]
        for row, arm in enumerate(arms):
            _arm_row(axes, own[own["arm"] == arm], row, arm)
        axes.set_title(setting)
        axes.set_yticks(range(len(arms)), [arm_label(arm) for arm in arms])
        axes.set_ylim(len(arms) - 0.4, -0.6)
        axes.set_xlim(-0.04, max(1.04, 1.04 * float(done["final"].max())))
    figure.supxlabel("final reward", fontsize=8)
    handles = [
        style.dot("seed", color=style.MUTED),
        style.dot("seed that collapsed", color=style.MUTED, markerfacecolor="none"),
        Line2D([], [], label="IQM, 95%", color=style.MUTED, linewidth=3, alpha=0.5),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    return figure


def _arm_row(axes: Axes, runs: pd.DataFrame, row: int, arm: str) -> None:
    """One arm of a panel: its seeds one above the other, their IQM and its interval."""
    if runs.empty:
        axes.text(0.5, row, "not run", ha="center", va="center", fontsize=6, color=style.MUTED)
        return
    runs = runs.sort_values("seed")
    ink = style.colour(arm)
    places = style.seed_places(row, len(runs))
    faces = ["none" if collapsed else ink for collapsed in runs["collapsed"]]
    total = bootstrap_interval(runs["final"])
    axes.plot(
        [total.low, total.high], [row, row], color=ink, linewidth=5, alpha=0.3,
        solid_capstyle="butt",
    )  # fmt: skip
    axes.scatter(
        runs["final"], places, s=8, facecolors=faces, edgecolors=ink, linewidths=0.8, zorder=3
    )
    axes.plot(total.value, row, "|", markersize=8, color=style.INK, markeredgewidth=1.4, zorder=4)
    if arm == "grpo":
        axes.axvline(total.value, color=ink, linewidth=0.8, linestyle=":", zorder=1)
