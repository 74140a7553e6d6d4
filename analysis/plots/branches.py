"""Which branch of the clipped surrogate the gradient comes from, over a run."""

from functools import partial

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from moe_rl.analysis.data.measures import with_gradient
from moe_rl.analysis.plots import style
from moe_rl.experiments.arms import arm_label

UNBOUNDED = "branch/negative_above"
FLIPPED = "branch/negative_above_flipped"
# From the bottom: the unbounded branch stands on the axis, where its height can be read.
STACK = (
    (UNBOUNDED, "A < 0, w above", "#b3261e"),
    ("branch/negative_inside", "A < 0, inside", "#e3a8a0"),
    ("branch/negative_below", "A < 0, w below", "#f2d6d2"),
    ("branch/positive_below", "A > 0, w below", "#cfdfee"),
    ("branch/positive_inside", "A > 0, inside", "#9dbbd8"),
    ("branch/positive_above", "A > 0, w above", "#2f5f8f"),
)


@style.styled
def branch_mass(updates: pd.DataFrame) -> Figure:
    """Share of the gradient's mass by branch against rollout step, one panel an arm.

    Areas are means over the updates with a gradient and over seeds; thin lines are the unbounded
    branch of single seeds, the dashed line its part on tokens with a flipped router, mean over
    seeds.
    """
    arms = style.arms_in(updates)
    figure, panels = style.grid(len(arms), columns=4, height=1.45)
    for axes, arm in zip(panels, arms, strict=True):
        _stack(axes, updates[updates["arm"] == arm])
        axes.set_title(style.wrapped(arm_label(arm), 22))
        axes.set_ylim(0, 1)
        axes.grid(visible=False)
    style.percent_axis(panels[0])
    style.whole_numbers(panels[0])
    figure.supxlabel("rollout step", fontsize=8)
    figure.supylabel("share of the gradient's mass", fontsize=8)
    handles: list[Patch | Line2D] = [Patch(color=ink, label=text) for _, text, ink in STACK]
    flipped = partial(Line2D, color=style.INK, linestyle="--", linewidth=1.1)
    handles.append(flipped([], [], label="A < 0, w above, router flipped"))
    figure.legend(handles=handles, loc="outside upper center", ncols=4, handlelength=1.6)
    return figure


def _stack(axes: Axes, updates: pd.DataFrame) -> None:
    names = [name for name, _, _ in STACK]
    own = with_gradient(updates)
    if own.empty:
        style.say(axes, "not measured")
        return
    per_seed = own.groupby(["step", "seed"])[[*names, FLIPPED]].mean()
    mean = per_seed.groupby("step").mean()
    axes.stackplot(
        mean.index, mean[names].T.to_numpy(), colors=[ink for _, _, ink in STACK], linewidth=0
    )
    seeds = per_seed[UNBOUNDED].unstack("seed")
    if seeds.shape[1] > 1:
        axes.plot(seeds.index, seeds, color=style.INK, linewidth=0.5, alpha=0.45)
    axes.plot(mean.index, mean[FLIPPED], color=style.INK, linestyle="--", linewidth=1.1)
    axes.margins(x=0)
