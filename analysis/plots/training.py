"""Reward, gradient norm, clipping, the joined chain."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_rl.analysis.data.collapse import outcome
from moe_rl.analysis.data.measures import last_updates
from moe_rl.analysis.plots import style
from moe_rl.experiments.arms import arm_label


@style.styled
def reward_by_arm(steps: pd.DataFrame) -> Figure:
    """Reward against rollout step: the main arms' medians in one panel, then one panel an arm.

    In an arm's panel every seed is a thin line and the median thick, the main arms' medians are
    grey, and a triangle on the axis marks the time of collapse of each collapsed seed.
    """
    arms = style.arms_in(steps)
    main = style.lead_arms(arms)
    count = len(arms) + 1 if len(arms) > 1 else 1
    figure, panels = style.grid(count, columns=4, height=1.55)
    if len(arms) > 1:
        for arm in main:
            _median(panels[0], steps, arm, style.colour(arm), 1.9)
        panels[0].set_title("medians")
        style.legend(figure, main)
    for axes, arm in zip(panels[-len(arms) :], arms, strict=True):
        reward_panel(axes, steps, arm, ghosts=main)
        axes.set_title(style.wrapped(arm_label(arm), 22))
    style.whole_numbers(panels[0])
    figure.supxlabel("rollout step", fontsize=8)
    figure.supylabel("reward", fontsize=8)
    return figure


def reward_panel(axes: Axes, steps: pd.DataFrame, arm: str, *, ghosts: list[str]) -> None:
    """The reward of one arm, with the medians of other arms in grey behind it."""
    for other in ghosts:
        if other != arm:
            _median(axes, steps, other, style.GHOST, 0.9)
    style.draw_arm(axes, steps, arm, "step", "reward")
    _mark_collapses(axes, steps, [arm])
    axes.set_ylim(*reward_limits(steps))


def reward_limits(steps: pd.DataFrame) -> tuple[float, float]:
    """The reward axis: from 0 to 1, or to the largest reward."""
    return -0.03, max(1.0, float(steps["reward"].astype(float).max())) + 0.03


@style.styled
def gradient_norm(updates: pd.DataFrame) -> Figure:
    """Gradient norm before clipping (mean over a rollout's updates), log scale."""
    return _lines(style.per_step(updates, "grad_norm"), "grad_norm", "gradient norm", log=True)


@style.styled
def clip_share(updates: pd.DataFrame) -> Figure:
    """Share of tokens whose gradient the clip removes, mean over a rollout's updates, log."""
    frame = style.per_step(updates, "clip_ratio/region")
    return _lines(frame, "clip_ratio/region", "clipped share of tokens", log=True)


@style.styled
def effective_sample_size(updates: pd.DataFrame) -> Figure:
    """ESS/N = 1/(1 + CV^2) of the token ratios at every rollout's last update, 0 to 1."""
    frame = last_updates(updates)
    figure = _lines(frame, "ratio/token_ess", "effective sample size / N", log=False)
    figure.axes[0].set_ylim(-0.03, 1.03)
    return figure


# Column, label, and whether on a log scale and a mean over updates; else a share at the last one.
CHAIN = [
    ("routing/churn", "routing churn\n(last update)", False),
    ("ratio/token_var", "Var of token\nratio", True),
    ("clip_ratio/region", "clipped share\nof tokens", True),
    ("grad_norm", "gradient\nnorm", True),
]


@style.styled
def chain(steps: pd.DataFrame, updates: pd.DataFrame) -> Figure:
    """The causal chain on one time axis: churn, ratio variance, clipping, gradient norm, reward."""
    arms = style.arms_in(steps)
    links = [link for link in CHAIN if style.has(updates, link[0])]
    figure = Figure(figsize=(style.WIDE, 1.15 * (len(links) + 1) + 0.6), layout="constrained")
    made = figure.subplots(len(links) + 1, 1, sharex=True, squeeze=False)
    panels: list[Axes] = list(made.flat)
    for axes, link in zip(panels[:-1], links, strict=True):
        _chain_panel(axes, updates, arms, *link)
    for arm in arms:
        style.draw_arm(panels[-1], steps, arm, "step", "reward")
    _mark_collapses(panels[-1], steps, arms)
    for axes in panels[:-1]:
        axes.set_xlabel("")  # the last panel says it for all
        for arm in arms:
            for time in _collapse_times(steps, arm):
                axes.axvline(time, color=style.colour(arm), linewidth=0.7, linestyle=":", alpha=0.8)
    panels[-1].set_ylim(*reward_limits(steps))
    panels[-1].set_ylabel("reward")
    style.step_axis(panels[-1])
    figure.align_ylabels(panels)
    style.legend(figure, arms)
    return figure


def _chain_panel(
    axes: Axes, updates: pd.DataFrame, arms: list[str], column: str, text: str, log: bool
) -> None:
    frame = style.per_step(updates, column) if log else last_updates(updates)
    drawn = [style.draw_arm(axes, frame, arm, "step", column, positive=log) for arm in arms]
    if not log:
        style.percent_axis(axes)
        axes.set_ylim(bottom=0)
    elif any(drawn):
        style.log_axis(axes)
    if not any(drawn):
        style.say(axes, "0 throughout" if column == "grad_norm" else style.zero_text(updates))
    axes.set_ylabel(text)


def _lines(frame: pd.DataFrame, column: str, text: str, *, log: bool) -> Figure:
    figure, axes, zero = style.line_figure(frame, "step", column, text, log=log)
    if zero and axes.lines:
        style.footnote(axes, f"0 throughout, not on a log axis: {', '.join(zero)}")
    elif zero:
        style.say(axes, "0 throughout in every arm")
    return figure


def _median(axes: Axes, steps: pd.DataFrame, arm: str, ink: str, width: float) -> None:
    table = steps[steps["arm"] == arm].pivot(index="step", columns="seed", values="reward")
    table, _ = style.in_blocks(table.astype(float), steps["step"])
    axes.plot(table.index, table.median(axis=1), color=ink, linewidth=width)


def _mark_collapses(axes: Axes, steps: pd.DataFrame, arms: list[str]) -> None:
    """A triangle at the foot of the panel at the time of collapse of every collapsed seed."""
    for arm in arms:
        for time in _collapse_times(steps, arm):
            axes.plot(
                [time], [0.0], marker="^", markersize=4, clip_on=False, color=style.colour(arm),
                markeredgecolor=style.MUTED, markeredgewidth=0.3, zorder=5,
            )  # fmt: skip


def _collapse_times(steps: pd.DataFrame, arm: str) -> list[float]:
    results = [
        outcome(run["reward"].astype(float), run["step"])
        for _, run in steps[steps["arm"] == arm].groupby("seed")
    ]
    return [result.collapse_step for result in results if result.collapsed]
