"""The list of figures of a report, each with its caption and what it needs.

A caption says how to read the figure. A figure whose columns no run has recorded is left out and
named in the report.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from moe_rl.analysis.data.load import StudyRuns
from moe_rl.analysis.plots import (
    branches,
    frontier,
    noise,
    ratios,
    remedies,
    response,
    restarts,
    routing,
    summary,
    tails,
    tolerance,
    training,
)
from moe_rl.analysis.plots.style import has


@dataclass(frozen=True, kw_only=True)
class FigureSpec:
    """A figure of a study, a setting or a map; `draw(study, run_measures(study))`."""

    key: str
    title: str
    caption: str
    draw: Callable[[StudyRuns, pd.DataFrame], Figure]
    needs: tuple[str, ...] = ()
    """Columns of steps.jsonl or updates.jsonl."""
    needs_rates: int = 0
    """Learning rates with complete runs of one arm, number of updates and router noise."""
    needs_noises: int = 0
    """Router noises with complete runs at one learning rate and number of updates."""
    half_width: bool = False
    """Half as wide as the text; two stand side by side."""
    every_arm: bool = False
    """A panel or row an arm. Others draw the main arms alone where there are too many lines."""

    def missing(self, study: StudyRuns) -> list[str]:
        """What it needs that no run of the study has."""
        recorded = (study.steps, study.updates)
        missing = [name for name in self.needs if not any(has(frame, name) for frame in recorded)]
        if _rates(study) < self.needs_rates:
            missing.append(f"{self.needs_rates} learning rates of one arm")
        noises = _most(study, ["learning_rate", "updates_per_rollout"], "router_noise")
        if noises < self.needs_noises:
            missing.append(f"{self.needs_noises} router noises at one learning rate")
        return missing


SEEDS = "Thin lines are seeds, thick lines the median over seeds."

FINAL_REWARDS = FigureSpec(
    key="final-rewards",
    title="Final reward of every arm",
    caption="Mean reward over the last eighth of the steps, complete runs. Every dot is a "
    "seed, open where it collapsed; seeds of an arm stand one below the other. The "
    "tick is the interquartile mean, the bar its 95% bootstrap interval, the dotted line the "
    "interquartile mean of GRPO.",
    draw=lambda study, measures: remedies.final_rewards(measures, study.settings),
    needs=("reward",),
    every_arm=True,
)

STUDY_FIGURES = [
    FigureSpec(
        key="main-arms",
        title="The collapse and its cures",
        caption="Mean reward of each rollout, arms side by side (of many the main ones). "
        f"{SEEDS} A triangle marks the step at which a seed collapses.",
        draw=lambda study, _: remedies.reward_side_by_side(study.steps, study.settings),
        needs=("reward",),
        every_arm=True,
    ),
    FINAL_REWARDS,
]

_RESPONSES = (
    ("by-updates", "Final reward by updates a rollout", "Mean reward of the last eighth of the "
     "steps, at equally many updates in all.", response.UPDATES),
    ("by-depth", "Churn by depth", "Share of activated experts that differ between old and new "
     "policy at the rollout's last update, over the first fifth of the steps.", response.DEPTH),
    ("by-length", "Variance of the sequence ratio by length", "Median over rollouts of the mean "
     "over updates, before the first collapse on the same seed; log scales.", response.LENGTH),
    ("by-compute", "Held-out pass@1 by compute", "At the end of the run, against the operations "
     "of all its forward and backward passes.", response.COMPUTE),
)  # fmt: skip


def measure_figures(measures: pd.DataFrame) -> list[FigureSpec]:
    """The figures that need no time course, as far as `run_measures(study)` has what they show."""
    responses = [
        FigureSpec(
            key=key,
            title=title,
            caption=f"{caption} Dots are seeds, lines join the medians.",
            draw=_response(what),
        )
        for key, title, caption, what in _RESPONSES
        if what.families(measures)
    ]
    return responses + ([RESTARTS_FIGURE] if len(restarts.restarted(measures)) else [])


def _response(what: response.Response) -> Callable[[StudyRuns, pd.DataFrame], Figure]:
    return lambda _, measures: response.response(measures, what)


RESTARTS_FIGURE = FigureSpec(
    key="restarts",
    title="Can a run be saved?",
    caption="Runs of GRPO that collapsed, started again from a checkpoint before their collapse "
    "and from their end. Every dot is a seed, open where the restart ends below half of the first "
    "run's peak.",
    draw=lambda _, measures: restarts.restarts(measures),
    every_arm=True,
)

TWIST_FIGURE = FigureSpec(
    key="twist",
    title="One thing changed",
    caption="GRPO as in the paper, and with one thing changed: its unbounded branch bounded (dual "
    "clip), or, where it was run, the sampling engine's log-probs in the ratio's denominator. "
    "Left: reward. Middle: share of tokens whose ratio exceeds t, before the first collapse of a "
    "main arm on the same seed, and the mean ratio (median over seeds); the lowest tick stands for "
    "0, and in the shaded region lies no ratio over the policy that sampled, unless it learnt from "
    "these very tokens. Right: share of the gradient's mass, the sum of |dL/dlogprob| over tokens, "
    "in the branch that the paper's surrogate leaves unbounded, until a run collapses. "
    f"{SEEDS}",
    draw=lambda study, measures: tails.twist(study.steps, study.updates, measures),
    needs=("reward", "ratio/survival_10", branches.UNBOUNDED),
    every_arm=True,
)

SETTING_FIGURES = [
    FigureSpec(
        key="summary",
        title="At a glance",
        caption="Reward; churn between the old policy and the policy at the rollout's last update; "
        f"variance of the token ratio inside an update, mean over the rollout's updates. {SEEDS}",
        draw=lambda study, _: summary.summary(study.steps, study.updates),
        needs=("reward",),
    ),
    FigureSpec(
        key="reward",
        title="Reward by arm",
        caption=f"Mean reward of each rollout. {SEEDS} In an arm's panel the grey lines are the "
        "main arms' medians, and a triangle marks the step at which a seed collapses.",
        draw=lambda study, _: training.reward_by_arm(study.steps),
        needs=("reward",),
        every_arm=True,
    ),
    FigureSpec(
        key="chain",
        title="The joined chain",
        caption="Read downwards: if routing causes the failure, churn rises first, then the "
        "variance of the token ratio, the clipped share and the gradient norm, and the reward "
        f"falls last. {SEEDS} Triangles and dotted lines mark collapses; variance, clipped share "
        "and gradient norm are on log scales.",
        draw=lambda study, _: training.chain(study.steps, study.updates),
        needs=("reward", "grad_norm"),
    ),
    FigureSpec(
        key="churn-by-layer",
        title="Churn by layer over time",
        caption="Share of activated experts that differ between the old policy and the policy at "
        "the rollout's last update; median over seeds. One colour scale for all panels; layer 0 "
        "is next to the embedding.",
        draw=lambda study, _: routing.churn_by_layer(study.updates),
        needs=("routing/churn_per_layer",),
    ),
    FigureSpec(
        key="ratio-variance",
        title="Variance of the importance ratios",
        caption="Variance of the token ratio w = exp(logprob - old_logprob) and of the sequence "
        "ratio exp(mean log w) inside an update, mean over the rollout's updates, before any "
        f"clamp. Log scale, shared. {SEEDS}",
        draw=lambda study, _: ratios.ratio_variance(study.updates),
        needs=("ratio/token_var", "ratio/sequence_var"),
    ),
    FigureSpec(
        key="survival",
        title="Right tail of the token ratio",
        caption="Share of tokens whose ratio w exceeds t, mean over the updates before a run's "
        "collapse; log scales, the lowest tick stands for 0. Left: over the old log-probs that the "
        "loss divides by; right: over those of the engine that sampled. There the share cannot "
        "exceed 1/t (dashed; Markov's inequality for a ratio of mean 1) for any policy that has "
        "not learnt from these very tokens, whatever routing does. Numbers: the mean of w, median "
        f"over seeds. {SEEDS}",
        draw=lambda study, measures: tails.survival(study.updates, measures),
        needs=("ratio/survival_10", "rollout_ratio/survival_10"),
    ),
    FigureSpec(
        key="branch-mass",
        title="Where the gradient comes from",
        caption="Share of the gradient's mass, the sum of |dL/dlogprob| over tokens, by sign of "
        "the advantage A and place of the ratio w, below, inside or above 0.8 to 1.27; mean over "
        "seeds and over a rollout's updates that have a gradient. Strong red: the branch that the "
        "surrogate of PPO and GRPO leaves unbounded, thin lines its single seeds. Dashed: the part "
        "of it on tokens with a router that chose other experts than the old policy's.",
        draw=lambda study, _: branches.branch_mass(study.updates),
        needs=(branches.UNBOUNDED,),
    ),
    FigureSpec(
        key="routing-against-weights",
        title="Routing part against weight part",
        caption="Variance of the two parts of log w on sampled updates (log scale, shared), and "
        "the routing part's share of Var(log w): dots are seeds, the tick the IQM, the bar its "
        "95% interval. Right of the dotted line routing dominates. Under replay the loss sees "
        "only the weight part; the routing part is what replay hides.",
        draw=lambda study, _: ratios.routing_against_weights(study.updates),
        needs=("ratio/routing_part", "ratio/weight_part", "ratio/part_covariance"),
    ),
    FigureSpec(
        key="churn-by-update",
        title="Churn by update within a rollout",
        caption="Churn against the number of optimiser steps since the old policy was recorded, "
        f"mean over all rollouts. {SEEDS}",
        draw=lambda study, _: routing.churn_by_update(study.updates),
        needs=("routing/churn",),
        half_width=True,
    ),
    FigureSpec(
        key="churn-by-position",
        title="Churn by response position",
        caption="Churn of the routing that predicts each response token, mean over sampled last "
        f"updates. {SEEDS}",
        draw=lambda study, _: routing.churn_by_position(study.updates),
        needs=("routing/churn_per_position",),
        half_width=True,
    ),
    FigureSpec(
        key="clip-share",
        title="Clipped share of tokens",
        caption="Share of tokens whose gradient the clip removes (for GSPO: tokens of clipped "
        f"responses), mean over the rollout's updates. Log scale. {SEEDS}",
        draw=lambda study, _: training.clip_share(study.updates),
        needs=("clip_ratio/region",),
        half_width=True,
    ),
    FigureSpec(
        key="gradient-norm",
        title="Gradient norm",
        caption=f"Before clipping, mean over the rollout's updates. Log scale. {SEEDS}",
        draw=lambda study, _: training.gradient_norm(study.updates),
        needs=("grad_norm",),
        half_width=True,
    ),
    FigureSpec(
        key="effective-sample-size",
        title="Effective sample size",
        caption="ESS/N = 1/(1 + CV\u00b2) of the token ratios at the rollout's last update: 1 is "
        f"on-policy, near 0 a few tokens carry all the weight. {SEEDS}",
        draw=lambda study, _: training.effective_sample_size(study.updates),
        needs=("ratio/token_ess",),
        half_width=True,
    ),
    FigureSpec(
        key="router-margin",
        title="Router margin",
        caption="Logit gap between the last chosen expert and the first one not chosen, mean over "
        f"response tokens and layers of the old policy: how near a flip is. {SEEDS}",
        draw=lambda study, _: routing.router_margin(study.steps),
        needs=("routing/margin",),
        half_width=True,
    ),
    FigureSpec(
        key="engine-mismatch",
        title="Rollout engine against trainer",
        caption="The same tokens and weights, scored by the rollout engine and by the trainer: "
        f"what differs here is numerics and router noise, not learning. {SEEDS}",
        draw=lambda study, _: routing.engine_mismatch(study.steps),
        needs=("mismatch/kl_k3",),
    ),
]

MAP_FIGURES = [
    FigureSpec(
        key="collapse-map",
        title="Collapse map",
        caption="Number and colour: final reward, median over seeds. A cross marks a cell whose "
        "median drawdown (fall of the final reward from the peak) exceeds 20%. n is the number of "
        "complete seeds; empty cells were not run.",
        draw=lambda _, measures: frontier.collapse_map(measures),
        needs=("reward",),
        needs_rates=2,
    ),
    FigureSpec(
        key="frontier",
        title="Stability frontier",
        caption="The largest learning rate at which the final reward stays within 20% of its peak "
        "(median drawdown over seeds), every smaller one tried being stable too. Vertical bars: "
        "range of the single seeds. A triangle is a lower bound: stable at the highest rate "
        "tried. An open circle: not stable at the lowest.",
        draw=lambda _, measures: frontier.frontier(measures),
        needs=("reward",),
        needs_rates=2,
    ),
    FigureSpec(
        key="noise-response",
        title="What router noise does",
        caption="At the learning rate and number of updates with the most noise levels. Left: "
        "share of (token, layer) pairs whose experts differ from the old policy's at the rollout's "
        "last update. Dots are seeds, lines their medians; the dense control has no router to "
        "perturb.",
        draw=lambda _, measures: noise.noise_response(measures),
        needs_noises=noise.FEWEST,
    ),
    FigureSpec(
        key="tolerance",
        title="How much disagreement each arm stands",
        caption="Final reward against what engine and trainer differ by at equal weights (the "
        "first rollout). Dots are seeds, lines join their medians. Dotted lines: real systems. "
        "vLLM 0.30 in bfloat16 was measured on this model; [R3] is what the paper reports between "
        "SGLang and Megatron-LM for other models (arXiv 2510.11370).",
        draw=lambda study, measures: tolerance.tolerance(study.steps, measures),
        needs=(tolerance.KL, tolerance.ROUTERS),
        needs_noises=noise.FEWEST,
    ),
]


# What all runs of a map have in common.
_ONE_MAP = ("family", "num_layers", "digits", "prompts_per_rollout", "hidden_noise")


def has_map(study: StudyRuns) -> bool:
    """Whether some arm has complete runs at two learning rates, or at as many router noises as a
    response is read from, all else on the map being equal.
    """
    noises = _most(study, ["arm", "updates_per_rollout", "learning_rate"], "router_noise")
    return _rates(study) > 1 or noises >= noise.FEWEST


def _rates(study: StudyRuns) -> int:
    return _most(study, ["arm", "updates_per_rollout", "router_noise"], "learning_rate")


def _most(study: StudyRuns, fixed: list[str], axis: str) -> int:
    """The most values of `axis` that complete runs have where `fixed` is equal.

    0: no such run, or runs of several models or rollouts, which are no places of one map.
    """
    done = study.runs[study.runs["complete"]]
    if done.empty or not {*fixed, axis} <= set(done.columns):
        return 0
    if any(done[name].nunique(dropna=False) > 1 for name in _ONE_MAP if name in done):
        return 0
    return int(done.groupby(fixed)[axis].nunique().max())
