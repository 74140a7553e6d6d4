"""Analysis room: the one figure of the README, from a real study."""

from __future__ import annotations

from matplotlib.figure import Figure

from moe_rl.analysis.load import AnalysisError, Study
from moe_rl.analysis.plots.style import (
    WIDE,
    arms_in,
    draw_arm,
    has,
    last_updates,
    legend,
    log_axis,
    per_step,
    percent_axis,
    step_axis,
    styled,
)


@styled
def readme_figure(
    study: Study, setting: str | None = None, arms: list[str] | None = None
) -> Figure:
    """Reward, churn and token-ratio variance of one setting, side by side (7 by 2.4 inches).

    `setting` defaults to the study's first, `arms` to all. Raises AnalysisError for a setting or
    arm that the study does not have.
    """
    name = study.settings[0] if setting is None else setting
    if name not in study.settings:
        raise AnalysisError(f"setting={name!r}: the study has {', '.join(study.settings)}")
    unknown = sorted(set(arms or []) - set(study.arms))
    if unknown:
        raise AnalysisError(f"arms={unknown}: the study has {', '.join(study.arms)}")
    one = study.setting(name)
    steps, updates = one.steps, one.updates
    shown = arms_in(steps) if arms is None else [arm for arm in arms_in(steps) if arm in arms]
    figure = Figure(figsize=(WIDE, 2.4), layout="constrained")
    reward, churn, variance = figure.subplots(1, 3, sharex=True)
    for arm in shown:
        draw_arm(reward, steps, arm, "step", "reward")
        if has(updates, "routing/churn"):
            draw_arm(churn, last_updates(updates), arm, "step", "routing/churn")
        if has(updates, "ratio/token_var"):
            frame = per_step(updates, "ratio/token_var")
            draw_arm(variance, frame, arm, "step", "ratio/token_var", positive=True)
    reward.set_ylim(-0.03, max(1.0, float(steps["reward"].astype(float).max())) + 0.03)
    reward.set_title("reward")
    churn.set_ylim(bottom=0)
    percent_axis(churn)
    churn.set_title("routing churn over a rollout")
    if variance.lines:
        log_axis(variance)
    variance.set_title("variance of the token ratio")
    for axes in (reward, churn, variance):
        step_axis(axes)
    legend(figure, shown)
    return figure
