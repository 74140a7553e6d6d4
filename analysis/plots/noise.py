"""What more and more router noise does, everything else equal."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_rl.analysis.plots import style

FEWEST = 3  # noise levels from which a response can be read
PLACE = ["learning_rate", "updates_per_rollout"]


def noise_ladder(measures: pd.DataFrame) -> pd.DataFrame:
    """The complete runs at the (learning rate, updates a rollout) with the most router noises.

    Empty where no place on the map has `FEWEST` of them. `measures` is `run_measures(study)`.
    """
    done = measures[measures["complete"]]
    counts = done.groupby(PLACE)["router_noise"].nunique()
    if counts.empty or counts.max() < FEWEST:
        return done.iloc[:0]
    rate, updates = counts.idxmax()
    chosen: pd.DataFrame = done[
        (done["learning_rate"] == rate) & (done["updates_per_rollout"] == updates)
    ]
    return chosen


@style.styled
def noise_response(measures: pd.DataFrame) -> Figure:
    """Router disagreement, variance of the token ratio and final reward against router noise.

    Dots are seeds, lines join the medians over seeds. Noise levels are spaced evenly. An arm that
    was run at one level only, as a control without a router to perturb, is a horizontal line.
    """
    ladder = noise_ladder(measures)
    levels = sorted(ladder["router_noise"].unique())
    arms = style.arms_in(ladder)
    figure, panels = style.grid(3, columns=3, height=2.2, sharey=False)
    for axes, (column, title) in zip(
        panels,
        (
            ("router_disagreement", "routers that differ"),
            ("token_var", "variance of the token ratio"),
            ("final", "final reward"),
        ),
        strict=True,
    ):
        for index, arm in enumerate(arms):
            own = ladder[ladder["arm"] == arm]
            _response(axes, own, column, levels, arm, 0.06 * (index - (len(arms) - 1) / 2))
        axes.set_title(title)
        axes.set_xticks(range(len(levels)), [f"{level:g}" for level in levels])
        axes.set_xlim(-0.4, len(levels) - 0.6)
    style.percent_axis(panels[0])
    style.log_axis(panels[1])
    panels[2].set_ylim(-0.03, 1.03)
    figure.supxlabel("router noise (standard deviation, logits)", fontsize=8)
    style.legend(figure, arms)
    return figure


def _response(
    axes: Axes, own: pd.DataFrame, column: str, levels: list[float], arm: str, offset: float
) -> None:
    values = own[["router_noise", column]].astype(float)
    values = values[np.isfinite(values[column])]
    if column == "token_var":
        values = values[values[column] > 0]
    if values.empty:
        return
    at = values["router_noise"].map(levels.index) + offset
    medians = style.draw_response(axes, at, values[column], arm)
    if len(medians) == 1:
        axes.plot([-0.4, len(levels) - 0.6], medians.repeat(2), **style.line_style(arm))
