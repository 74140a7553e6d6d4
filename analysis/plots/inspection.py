"""The figures of an inspected batch, from what inspection.json holds."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from moe_rl.analysis.plots import style
from moe_rl.analysis.plots.branches import STACK

_LINES = (
    ("#d55e00", "-", "o"),
    ("#0072b2", "--", "s"),
    ("#6a51a3", "-.", "^"),
    ("#009e73", ":", "D"),
    ("#56b4e9", "-", "v"),
)
MOST_BESIDE = len(_LINES)  # batches that one figure holds


@style.styled
def engine_against_trainer(scatter: Sequence[Sequence[float]]) -> Figure:
    """Probability of each sampled token by the engine (x) and by the trainer (y), log axes."""
    figure = Figure(figsize=(style.COLUMN, 3.0), layout="constrained")
    axes = figure.subplots()
    _scatter(axes, scatter, _lowest([scatter]))
    axes.set_xlabel("probability by the engine")
    axes.set_ylabel("probability by the trainer")
    return figure


@style.styled
def tails(pairs: Sequence[Mapping[str, Any]]) -> Figure:
    """Left: P(w > t) beside 1/t. Right: F(tau), the share of tokens off by more than a factor."""
    figure, (left, right) = style.grid(2, columns=2, height=2.4, sharex=False, sharey=False)
    _tails(left, right, pairs)
    figure.legend(loc="outside upper center", ncols=2)
    return figure


@style.styled
def side_by_side(batches: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Engine against trainer of several batches (name -> what inspection.json holds), above their
    tails, trainer over engine.
    """
    heights = [style.WIDE / len(batches) + 0.5, 2.6]  # panels as high as wide, and their words
    figure = Figure(figsize=(style.WIDE, sum(heights)), layout="constrained")
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)[:, 0]
    scatters = [found["scatter"] for found in batches.values()]
    panels = upper.subplots(1, len(scatters), squeeze=False, sharey=True)[0]
    for axes, scatter, name in zip(panels, scatters, batches, strict=True):
        _scatter(axes, scatter, _lowest(scatters))
        axes.set_title(name)
    upper.supxlabel("probability by the engine", fontsize=8)
    panels[0].set_ylabel("by the trainer")
    left, right = lower.subplots(1, 2)
    _tails(left, right, [_engine_pair(found) | {"name": name} for name, found in batches.items()])
    lower.legend(loc="outside lower center", ncols=len(batches) + 1)
    return figure


def _engine_pair(found: Mapping[str, Any]) -> dict[str, Any]:
    """The trainer over the engine, before the updates where both were recorded."""
    return dict(next(pair for pair in found["pairs"] if pair["denominator"] == "rollout_logprobs"))


def _lowest(scatters: Sequence[Sequence[Sequence[float]]]) -> float:
    """The decade at or below the smallest probability."""
    smallest = min(min(point) for scatter in scatters for point in scatter)
    return float(10.0 ** np.floor(np.log10(max(smallest, 1e-12))))


def _scatter(axes: Axes, scatter: Sequence[Sequence[float]], low: float) -> None:
    points = np.clip(np.array(scatter, dtype=float), 1e-12, 1.0)
    axes.plot([low, 1], [low, 1], color=style.GHOST, linewidth=0.8, zorder=1)
    for factor in (0.5, 2.0):  # F(2) counts what lies outside
        axes.plot([low, 1], [low * factor, factor], color=style.GHOST, linewidth=0.6, linestyle=":")
    axes.plot(
        points[:, 0], points[:, 1], "o", color="#0072b2", alpha=0.5, markersize=1.8,
        markeredgewidth=0, zorder=2, rasterized=True,
    )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, 1.2)
    axes.set_ylim(low, 1.2)
    axes.set_aspect("equal")
    _plain(axes.xaxis)
    _plain(axes.yaxis)


def _tails(left: Axes, right: Axes, pairs: Sequence[Mapping[str, Any]]) -> None:
    ts = [t for t, _ in pairs[0]["survival"]]
    left.plot(ts, [1 / t for t in ts], color=style.INK, linewidth=1, linestyle="--", label="1/t")
    shares = [s for pair in pairs for key in ("survival", "extreme") for _, s in pair[key] if s > 0]
    floor = 10.0 ** (np.floor(np.log10(min(shares, default=1e-3))) - 1)
    for axes, key in ((left, "survival"), (right, "extreme")):
        for pair, (colour, dash, mark) in zip(pairs, _LINES, strict=False):
            x, y = zip(*pair[key], strict=True)
            axes.plot(
                x, np.maximum(y, floor), color=colour, linestyle=dash, marker=mark, markersize=3,
                linewidth=1.4, label=pair["name"] if axes is left else None,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylim(floor, 1)
        _plain(axes.xaxis)
        axes.yaxis.set_major_formatter(
            FuncFormatter(lambda v, _: "0" if v <= floor * 1.01 else style.plain_number(v))
        )
        axes.yaxis.set_minor_locator(NullLocator())
    left.set_xlabel("ratio t")
    left.set_ylabel("P(w > t)")
    right.set_xlabel("factor tau")
    right.set_ylabel("F(tau)")


@style.styled
def branches(metrics: Mapping[str, float]) -> Figure:
    """Share of the gradient's mass by branch of the surrogate."""
    figure = Figure(figsize=(style.WIDE, 1.2), layout="constrained")
    axes = figure.subplots()
    start = 0.0
    for name, label, colour in STACK:
        share = metrics[name]
        axes.barh(0, share, left=start, color=colour, label=f"{label}: {share:.1%}")
        start += share
    axes.set_xlim(0, max(start, 1e-9))
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.xaxis.set_major_formatter(FuncFormatter(style.percent))
    figure.legend(loc="outside upper center", ncols=3)
    return figure


@style.styled
def routers_by_layer(by_layer: Sequence[Sequence[float]]) -> Figure:
    """Churn and router disagreement of each layer, engine against trainer."""
    figure = Figure(figsize=(style.COLUMN, 2.3), layout="constrained")
    axes = figure.subplots()
    for values, (colour, dash, mark), label in zip(
        zip(*by_layer, strict=True), _LINES, ("expert slots", "routers"), strict=False
    ):
        axes.plot(
            range(len(values)), values, color=colour, linestyle=dash, marker=mark, markersize=3,
            linewidth=1.4, label=label,
        )  # fmt: skip
    axes.set_xlabel("MoE layer")
    axes.set_ylabel("differ")
    axes.set_ylim(bottom=0)
    style.whole_numbers(axes)
    style.percent_axis(axes)
    axes.legend()
    return figure


SHOWN = ("reward", "branch/negative_above", "routing/churn", "ratio/token_var", "clip_ratio/region")


@style.styled
def history(lines: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    """The main metrics of a log against its steps, one panel each."""
    names = [name for name in SHOWN if name in lines] or sorted(lines)[:3]
    figure, panels = style.grid(len(names), columns=3, height=1.9, sharey=False)
    for axes, name in zip(panels, names, strict=True):
        steps, values = zip(*lines[name], strict=True)
        axes.plot(steps, values, color=_LINES[1][0], linewidth=1.4)
        axes.set_title(name)
        style.whole_numbers(axes)
    figure.supxlabel("step", fontsize=8)
    return figure


def _plain(axis: Any) -> None:
    axis.set_major_formatter(FuncFormatter(style.plain_number))
    axis.set_minor_locator(NullLocator())
