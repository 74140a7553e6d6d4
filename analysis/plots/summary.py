"""One figure that says what happened in a setting; the README shows one."""

import pandas as pd
from matplotlib.figure import Figure

from moe_rl.analysis.data.measures import last_updates
from moe_rl.analysis.plots import style
from moe_rl.analysis.plots.training import reward_limits
from moe_rl.experiments.arms import ARMS, STORY_ARMS


@style.styled
def summary(steps: pd.DataFrame, updates: pd.DataFrame) -> Figure:
    """Reward, churn and token-ratio variance of one setting, side by side.

    The arms of `STORY_ARMS` that were run, and arms of the user; all arms where none of them was.
    """
    arms = style.arms_in(steps)
    shown = [arm for arm in arms if arm in STORY_ARMS or arm not in ARMS] or arms
    figure, panels = style.grid(3, columns=3, height=2.05, sharey=False)
    reward, churn, variance = panels
    for arm in shown:
        style.draw_arm(reward, steps, arm, "step", "reward")
        if style.has(updates, "routing/churn"):
            style.draw_arm(churn, last_updates(updates), arm, "step", "routing/churn")
        if style.has(updates, "ratio/token_var"):
            frame = style.per_step(updates, "ratio/token_var")
            style.draw_arm(variance, frame, arm, "step", "ratio/token_var", positive=True)
    reward.set_ylim(*reward_limits(steps))
    reward.set_title("reward")
    churn.set_ylim(bottom=0)
    style.percent_axis(churn)
    churn.set_title("routing churn over a rollout")
    if variance.lines:
        style.log_axis(variance)
    variance.set_title("variance of the token ratio")
    for axes in (reward, churn, variance):
        style.step_axis(axes)
    style.legend(figure, shown)
    return figure
