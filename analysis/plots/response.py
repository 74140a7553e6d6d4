"""What a quantity does where one thing of a family of settings grows and all else is equal."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from moe_rl.analysis.plots import style

LAST_NUMBER = r"[\d.]+$"  # settings of one family have names that differ in it alone
SPREAD = 1.5  # largest over smallest x from which a response can be read


@dataclass(frozen=True, kw_only=True)
class Response:
    """Two columns of `run_measures`; `x` grows within a family of settings."""

    x: str
    y: str
    x_label: str
    y_label: str
    log: bool = False
    """A logarithmic y axis."""

    def families(self, measures: pd.DataFrame) -> dict[str, pd.DataFrame]:
        """Family, as digits-N -> its complete runs, with the mean x of their setting as `at`.

        Empty where x does not grow by `SPREAD` in any. `measures` is `run_measures(study)`.
        """
        done = measures[measures["complete"]].astype({self.x: float, self.y: float})
        lowest = 0.0 if self.log else -np.inf
        done = done[np.isfinite(done[self.x]) & np.isfinite(done[self.y]) & (done[self.y] > lowest)]
        at = done.groupby("setting")[self.x].transform("mean")
        names = done["setting"].str.replace(LAST_NUMBER, "", regex=True)
        families = done.assign(at=at).groupby(names, sort=False)
        return {
            f"{name}N": own for name, own in families if own["at"].max() >= SPREAD * own["at"].min()
        }


UPDATES = Response(
    x="updates_per_rollout", y="final", x_label="updates a rollout", y_label="final reward"
)
DEPTH = Response(
    x="num_layers", y="churn_early", x_label="layers", y_label="churn over a rollout, early"
)
LENGTH = Response(
    x="response_length", y="sequence_var", x_label="tokens of a response",
    y_label="variance of the sequence ratio", log=True,
)  # fmt: skip
COMPUTE = Response(
    x="operations", y="pass_at_1", x_label="floating-point operations", y_label="held-out pass@1"
)


@style.styled
def response(measures: pd.DataFrame, what: Response) -> Figure:
    """One panel a family: dots are seeds, lines join the medians of an arm."""
    families = what.families(measures)
    arms = style.arms_in(pd.concat(list(families.values())))
    figure, panels = style.grid(len(families), columns=3, height=2.2, sharex=False)
    for axes, (name, own) in zip(panels, families.items(), strict=True):
        for index, arm in enumerate(arms):
            runs = own[own["arm"] == arm]
            shift = 1 + 0.03 * (index - len(arms) / 2)
            style.draw_response(axes, runs["at"] * shift, runs[what.y], arm)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(sorted(own["at"].unique())))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(_tick))
        axes.set_title(name)
    if what.log:
        style.log_axis(panels[0])
    else:
        panels[0].set_ylim(bottom=-0.03)
    figure.supxlabel(what.x_label, fontsize=8)
    figure.supylabel(what.y_label, fontsize=8)
    style.legend(figure, arms)
    return figure


def _tick(value: float, _position: int | None = None) -> str:
    return style.plain_number(float(f"{value:.2g}"), digits=1)
