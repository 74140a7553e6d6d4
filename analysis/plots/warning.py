"""How well each signal tells a coming collapse, and how much of that is knowing the arm."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from moe_rl.analysis.plots import style
from moe_rl.analysis.warning.evaluate import FEWEST_SETTINGS
from moe_rl.analysis.warning.signals import SIGNALS

# (column, prefix of its counts, label, colour, marker, offset of its row)
_KINDS = (
    ("auc", "", "among the runs of a setting, mean over settings", "#0072b2", "o", 0.17),
    ("within_arm", "within_arm_", "among the runs of a setting and arm", "#d55e00", "D", -0.17),
)


@style.styled
def auc_by_signal(aucs: pd.DataFrame) -> Figure:
    """AUC with its interval, a row a signal and a panel a horizon; see `auc_table`.

    One half is chance. A hollow dot rests on less than 5 settings; a signal without a dot was not
    logged, or has no pair of runs. Horizons at which no setting counts have no panel.
    """
    told = aucs[aucs["settings"] > 0]
    horizons = list(dict.fromkeys((aucs if told.empty else told)["horizon"]))
    rows = list(SIGNALS)[::-1]
    figure, panels = style.grid(len(horizons), columns=len(horizons), height=0.17 * len(rows) + 0.6)
    for axes, horizon in zip(panels, horizons, strict=True):
        own = aucs[aucs["horizon"] == horizon].set_index("signal").reindex(rows)
        axes.axvline(0.5, color=style.MUTED, linewidth=0.9)
        for column, prefix, _, colour, marker, offset in _KINDS:
            at = np.arange(len(rows)) + offset
            value, low, high = (own[column + end].to_numpy(float) for end in ("", "_low", "_high"))
            axes.hlines(at, low, high, color=colour, linewidth=1.1)
            few = (own[f"{prefix}settings"] < FEWEST_SETTINGS).to_numpy()
            dots: dict[str, Any] = {"color": colour, "markersize": 3, "linestyle": "none"}
            axes.plot(value[~few], at[~few], marker, **dots)
            axes.plot(value[few], at[few], marker, markerfacecolor=style.PAPER, **dots)
        counts = own[["settings", "collapses", "survivors"]].max()
        settings = "1 setting" if counts["settings"] == 1 else f"{counts['settings']:.0f} settings"
        axes.set_title(
            f"first {horizon} steps\n{settings}\n"
            f"{counts['collapses']:.0f} of {counts[['collapses', 'survivors']].sum():.0f} collapse"
        )
        axes.set_xlim(-0.03, 1.03)
        axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        axes.set_ylim(-0.7, len(rows) - 0.3)
        axes.set_yticks(range(len(rows)), [SIGNALS[name].label for name in rows])
    figure.supxlabel("AUC, worst value so far against a later collapse", fontsize=8)
    handles = [
        Line2D([], [], color=colour, marker=marker, markersize=3, linewidth=1.1, label=label)
        for _, _, label, colour, marker, _ in _KINDS
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2)
    return figure
