"""The right tail of the importance ratio, beside the bound that the sampling policy obeys."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from moe_rl.analysis.data.measures import before_collapse, with_gradient
from moe_rl.analysis.plots import style
from moe_rl.analysis.plots.branches import UNBOUNDED
from moe_rl.experiments.arms import arm_label

RATIOS = (2, 10, 100, 1000)  # moe_rl.metrics.ratios.SURVIVAL, which needs torch
OWN, ENGINE = "ratio/survival", "rollout_ratio/survival"
TWIST_ARMS = ("grpo", "grpo+dual-clip", "grpo+rollout-old")
"""One loss, and one thing of it changed: its unbounded branch, or the ratio's denominator."""
MOST_MEANS = 5  # lines of text that the corner above the bound holds


@style.styled
def survival(updates: pd.DataFrame, measures: pd.DataFrame) -> Figure:
    """P(w > t) against t, log-log, for both denominators, beside the bound 1/t.

    Means over the updates before the first collapse of a main arm on the same seed. Left: the ratio
    of the loss; right: the same numerator over the rollout engine's log-probs. The lowest tick
    stands for 0. Numbers are each arm's mean w, the median over seeds.
    """
    rows = before_collapse(updates, measures)
    arms = style.arms_in(updates)
    figure, panels = style.grid(2, columns=2, height=2.4)
    floor = min(_lowest(rows, OWN), _lowest(rows, ENGINE)) / 10
    for axes, prefix, title in (
        (panels[0], OWN, "w over the old policy of the loss"),
        (panels[1], ENGINE, "w over the policy that sampled"),
    ):
        _tail(axes, rows, prefix, arms, floor)
        axes.set_title(title)
    panels[0].set_ylabel("P(w > t)")
    figure.supxlabel("ratio t", fontsize=8)
    style.legend(figure, arms)
    return figure


@style.styled
def twist(steps: pd.DataFrame, updates: pd.DataFrame, measures: pd.DataFrame) -> Figure:
    """Reward, tail of the ratio and unbounded branch of GRPO and of its changes of one line."""
    arms = [arm for arm in TWIST_ARMS if (steps["arm"] == arm).any()]
    figure, panels = style.grid(3, columns=3, height=2.1, sharex=False, sharey=False)
    rows = before_collapse(updates, measures)
    rows = rows[rows["arm"].isin(arms)]
    # A run that has collapsed has few groups with a gradient, whose shares jump.
    alive = before_collapse(updates, measures, "collapse_step")
    unbounded = style.per_step(with_gradient(alive), UNBOUNDED)
    for arm in arms:
        style.draw_arm(panels[0], steps, arm, "step", "reward")
        style.draw_arm(panels[2], unbounded, arm, "step", UNBOUNDED)
    panels[0].set_ylim(-0.03, 1.03)
    panels[0].set_title("reward")
    _tail(panels[1], rows, OWN, arms, _lowest(rows, OWN) / 10)
    panels[1].set_title("P(w > t) of the loss's ratio")
    panels[1].set_xlabel("ratio t")
    panels[2].set_title("gradient's mass in A < 0, w above")
    panels[2].set_ylim(bottom=0)
    style.percent_axis(panels[2])
    style.step_axis(panels[0])
    style.step_axis(panels[2])
    style.legend(figure, arms)
    return figure


def _lowest(rows: pd.DataFrame, prefix: str) -> float:
    """The decade at or below the smallest positive share of a run; 0 has no place on a log axis."""
    shares = _shares(rows, prefix)["share"]
    smallest = float(shares[shares > 0].min()) if (shares > 0).any() else 1e-3
    return float(10.0 ** np.floor(np.log10(smallest)))


def _shares(rows: pd.DataFrame, prefix: str) -> pd.DataFrame:
    """Columns arm, seed, complete, t and share, a run's mean over its updates."""
    names = {f"{prefix}_{t}": t for t in RATIOS if f"{prefix}_{t}" in rows}
    means = rows.groupby(["arm", "seed", "complete"])[list(names)].mean().astype(float)
    means = means.rename(columns=names).rename_axis(columns="t")
    return means.stack().rename("share").reset_index()


def _tail(axes: Axes, rows: pd.DataFrame, prefix: str, arms: list[str], floor: float) -> None:
    shares = _shares(rows, prefix)
    shares["share"] = shares["share"].clip(lower=floor)
    axes.set_xscale("log")
    axes.set_yscale("log")
    bound = [1 / t for t in RATIOS]
    axes.plot(RATIOS, bound, color=style.INK, linewidth=1, linestyle="--")
    axes.fill_between(RATIOS, bound, 1.0, color=style.GRID, alpha=0.7, linewidth=0)
    axes.text(26, 1 / 19, "1/t", fontsize=7, color=style.INK)
    drawn = [style.draw_arm(axes, shares, arm, "t", "share") for arm in arms]
    if not any(drawn):
        style.say(axes, "not measured")
        return
    axes.set_xlim(RATIOS[0], RATIOS[-1])
    axes.set_ylim(floor, 1)
    axes.xaxis.set_major_locator(FixedLocator(list(RATIOS)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(style.plain_number))
    style.log_axis(axes)
    axes.set_yticks([floor, *(tick for tick in axes.get_yticks() if floor * 5 < tick <= 1)])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: "0" if value <= floor * 1.01 else style.plain_number(value))
    )
    _means(axes, rows, prefix, arms)
    missing = [arm_label(arm) for arm, own in zip(arms, drawn, strict=True) if not own]
    if missing:
        style.footnote(axes, f"not measured: {', '.join(missing)}")


def _means(axes: Axes, rows: pd.DataFrame, prefix: str, arms: list[str]) -> None:
    """The mean of w beside its tail, which says whether the denominator is who sampled."""
    column = prefix.replace("survival", "mean")
    if column not in rows or len(arms) > MOST_MEANS:
        return
    means = rows.groupby(["arm", "seed"])[column].mean().groupby("arm").median()
    for line, arm in enumerate(arm for arm in arms if arm in means):
        text = f"mean w {style.plain_number(float(f'{means[arm]:.3g}'), digits=1)}"
        y = 0.97 - 0.07 * line
        axes.text(
            0.97, y, text, fontsize=7, ha="right", va="top",
            color=style.colour(arm), transform=axes.transAxes,
        )  # fmt: skip
