"""Churn by layer, update and position; engine mismatch."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from moe_rl.analysis.data.load import is_dense
from moe_rl.analysis.data.measures import last_updates
from moe_rl.analysis.plots import style
from moe_rl.experiments.arms import arm_label

PER_LAYER = "routing/churn_per_layer"
PER_POSITION = "routing/churn_per_position"
DENSE_TEXT = "0 by construction:\nevery expert is\nalways on"


@style.styled
def churn_by_layer(updates: pd.DataFrame) -> Figure:
    """Heatmap of churn at every rollout's last update: layer against step, one panel an arm.

    Median over seeds; one colour scale for all panels. Layer 0 is next to the embedding.
    """
    arms = style.arms_in(updates)
    last = last_updates(updates)
    pictures = {arm: _layer_by_step(last[last["arm"] == arm]) for arm in arms}
    top = max((float(np.nanmax(p)) for p in pictures.values() if p.size), default=0.0)
    layers = max((len(p) for p in pictures.values()), default=1)
    figure, panels = style.grid(len(arms), columns=3, height=1.25)
    image: Any = None
    for axes, arm in zip(panels, arms, strict=True):
        axes.set_title(arm_label(arm))
        axes.grid(visible=False)
        picture = pictures[arm]
        axes.set_ylim(-0.5, layers - 0.5)
        if is_dense(updates[updates["arm"] == arm]):
            style.say(axes, DENSE_TEXT)
            continue
        if not top or not picture.size:
            style.say(axes, style.zero_text(updates) if picture.size else "not measured")
            continue
        steps = last.loc[last["arm"] == arm, "step"]
        extent = (steps.min() - 0.5, steps.max() + 0.5, -0.5, len(picture) - 0.5)
        image = axes.imshow(
            picture, origin="lower", aspect="auto", interpolation="nearest", extent=extent,
            cmap=style.CMAP, vmin=0, vmax=top,
        )  # fmt: skip
        axes.set_yticks(_layer_ticks(layers))
    style.whole_numbers(panels[0])
    if image is not None:
        style.colour_bar(figure, image, panels, "churn", style.percent)
    figure.supxlabel("rollout step", fontsize=8)
    figure.supylabel("MoE layer", fontsize=8)
    return figure


def _layer_by_step(last: pd.DataFrame) -> NDArray[np.float64]:
    """Median over seeds of the per-layer lists: [layers, steps]; empty where there is none."""
    rows = _entries(last, PER_LAYER, "layer", first=0)
    medians = rows.groupby(["layer", "step"])[PER_LAYER].median().unstack()
    return medians.reindex(columns=sorted(last["step"].unique())).to_numpy()


def _entries(updates: pd.DataFrame, column: str, number: str, *, first: int) -> pd.DataFrame:
    """The lists of `column`, one row an entry, numbered from `first` in the column `number`."""
    lists = updates[[isinstance(value, list) for value in updates[column]]]
    rows = lists[["arm", "seed", "step", column]].explode(column).astype({column: float})
    rows[number] = rows.groupby(level=0).cumcount() + first
    return rows


def _layer_ticks(layers: int) -> list[int]:
    return list(range(layers)) if layers <= 6 else [0, layers // 2, layers - 1]


@style.styled
def churn_by_update(updates: pd.DataFrame) -> Figure:
    """Churn against the number of optimiser steps since the old policy, mean over rollouts."""
    keys = ["arm", "seed", "update"]
    frame = updates[[*keys, "routing/churn"]].astype({"routing/churn": float})
    frame = frame.groupby(keys, as_index=False)["routing/churn"].mean()
    return _churn_lines(updates, frame, "update", "optimiser steps since the old policy")


@style.styled
def churn_by_position(updates: pd.DataFrame) -> Figure:
    """Churn against the position of the response token, mean over sampled last updates."""
    rows = _entries(updates, PER_POSITION, "position", first=1)
    rows = rows.replace([np.inf, -np.inf], np.nan)
    keys = ["arm", "seed", "position"]
    frame = rows.groupby(keys, as_index=False)[PER_POSITION].mean()
    frame = frame.rename(columns={PER_POSITION: "routing/churn"})
    return _churn_lines(updates, frame, "position", "position in the response (tokens)")


def _churn_lines(updates: pd.DataFrame, frame: pd.DataFrame, x: str, text: str) -> Figure:
    figure, axes, _ = style.line_figure(frame, x, "routing/churn", "routing churn", text)
    arms = style.arms_in(frame)
    dense = [arm_label(arm) for arm in arms if is_dense(updates[updates["arm"] == arm])]
    if dense:
        axes.set_title(f"{', '.join(dense)}: 0 by construction", fontsize=7, loc="right")
    axes.set_ylim(bottom=0)
    style.percent_axis(axes)
    return figure


@style.styled
def router_margin(steps: pd.DataFrame) -> Figure:
    """Gap between the K-th and the (K+1)-th router logit of the old policy, mean over layers."""
    label = "router margin (logits)"
    figure, axes, absent = style.line_figure(steps, "step", "routing/margin", label)
    if absent:
        axes.set_title(f"{', '.join(absent)}: no choice by logits", fontsize=7, loc="right")
    axes.set_ylim(bottom=0)
    return figure


MISMATCH = [
    ("mismatch/kl_k3", "KL (k3, nats a token)", True),
    ("mismatch/extreme_2", "share of tokens, ratio > 2", True),
    ("mismatch/router_disagreement", "routers that disagree", False),
]


@style.styled
def engine_mismatch(steps: pd.DataFrame) -> Figure:
    """Rollout engine against trainer on equal weights, one panel a measure."""
    shown = [row for row in MISMATCH if style.has(steps, row[0])]
    arms = style.arms_in(steps)
    figure, panels = style.grid(len(shown), columns=3, height=1.7, sharey=False)
    for axes, (column, text, log) in zip(panels, shown, strict=True):
        drawn = [style.draw_arm(axes, steps, arm, "step", column, positive=log) for arm in arms]
        if log and any(drawn):
            style.log_axis(axes)
        elif not any(drawn):
            style.say(axes, "0 throughout:\nengine and trainer agree")
        if not log:
            style.percent_axis(axes)
            axes.set_ylim(bottom=0)
        axes.set_title(text)
    style.whole_numbers(panels[0])
    figure.supxlabel("rollout step", fontsize=8)
    style.legend(figure, arms)
    return figure
