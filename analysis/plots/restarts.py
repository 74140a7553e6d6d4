"""Runs that were started again from before and from after their collapse."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_rl.analysis.plots import style
from moe_rl.analysis.verdicts.rules import RESTARTS, least_of_restarts

ROW = 0.24  # inches a way of restarting
SAVED, DOWN = "#009e73", "#d55e00"
WAYS = {
    "same": "as it was", "half-rate": "at half the rate", "no-noise": "without noise",
    "dual-clip": "with dual clip", "gspo": "with GSPO", "replay": "with R3",
}  # fmt: skip


def restarted(measures: pd.DataFrame) -> pd.DataFrame:
    """The restarts of the grpo runs that collapsed, with `when`, `way` and `least`.

    `least` is half of the highest reward of the run that was started again. `measures` is
    `run_measures(study)`.
    """
    done = measures[measures["complete"]]
    again = done[done["arm"].str.startswith(RESTARTS)]
    settings = done[done["setting"].isin(again["setting"])].groupby("setting")
    least = {
        (setting, seed): half
        for setting, runs in settings
        for seed, half in least_of_restarts(runs).items()
    }
    places = zip(again["setting"], again["seed"], strict=True)
    parts = again["arm"].str.split("-", n=1, expand=True).reindex(columns=[0, 1])
    again = again.assign(when=parts[0], way=parts[1], least=[least.get(place) for place in places])
    return again.dropna(subset="least").astype({"least": float})


@style.styled
def restarts(measures: pd.DataFrame) -> Figure:
    """Final reward of every restart; open where it ends below half of the first run's peak."""
    runs = restarted(measures)
    whens = [name.rstrip("-") for name in RESTARTS]
    ways = list(dict.fromkeys([*WAYS, *runs["way"]]))
    figure, panels = style.grid(len(whens), columns=2, height=ROW * len(ways) + 0.45)
    for axes, when in zip(panels, whens, strict=True):
        for row, way in enumerate(ways):
            _row(axes, runs[(runs["when"] == when) & (runs["way"] == way)], row)
        axes.set_title(f"from {when} the collapse")
        axes.set_yticks(range(len(ways)), [WAYS.get(way, way) for way in ways])
        axes.set_ylim(len(ways) - 0.4, -0.6)
        axes.set_xlim(-0.04, 1.04)
    figure.supxlabel("final reward of the restart", fontsize=8)
    down = "seed that stays below half of the first run's peak"
    handles = [
        style.dot("seed", color=SAVED), style.dot(down, color=DOWN, markerfacecolor="none")
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside upper center", ncols=2)
    return figure


def _row(axes: Axes, runs: pd.DataFrame, row: int) -> None:
    runs = runs.sort_values("seed")
    places = style.seed_places(row, len(runs))
    down = (runs["final"] < runs["least"]).to_numpy(bool)
    for inks, some, face in ((SAVED, ~down, SAVED), (DOWN, down, "none")):
        axes.scatter(
            runs["final"][some], places[some], s=9, facecolors=face, edgecolors=inks,
            linewidths=0.8, zorder=3,
        )  # fmt: skip
