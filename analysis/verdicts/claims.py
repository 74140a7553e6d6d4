"""The claims of the GSPO paper and ours, each with our number and a verdict from the data.

Every claim is judged in one setting at a time, on complete runs only, by its function in
`rules.py`. The paper's come first, then our controls, which a verdict about routing needs, then
what we claim ourselves.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from moe_rl.analysis.data.load import StudyRuns
from moe_rl.analysis.data.measures import run_measures
from moe_rl.analysis.verdicts import rules
from moe_rl.analysis.verdicts.verdicts import (
    INCONCLUSIVE,
    MIN_SEEDS,
    NOT_JUDGED,
    STABLE,
    Judgement,
)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One row of the claims table before it meets data."""

    text: str
    source: str
    paper: str
    judge: Callable[[pd.DataFrame], Judgement]
    alike: tuple[str, ...] = ()
    """Judged on the grpo runs of all settings that agree with this one in these columns."""

    @property
    def key(self) -> str:
        """The name of `judge`."""
        return self.judge.__name__

    @property
    def rule(self) -> str:
        """The rule of the verdict: the docstring of `judge` on one line."""
        return " ".join((inspect.getdoc(self.judge) or "").split())


_PAPER = "GSPO paper"  # arXiv 2507.18071
_OURS = "our claim"
PAPER_CLIP_GSPO, PAPER_CLIP_GRPO = 0.15, 0.0013  # its figure 2
CLAIMS = [
    Claim(
        text="GRPO without Routing Replay collapses",
        source=f"{_PAPER}, 5.3 and figure 3",
        paper="one curve, fails to converge",
        judge=rules.grpo_collapses,
    ),
    Claim(
        text="Routing Replay restores GRPO",
        source=f"{_PAPER}, 5.3 and figure 3",
        paper="one curve, converges",
        judge=rules.replay_restores,
    ),
    Claim(
        text="GSPO needs no Routing Replay",
        source=f"{_PAPER}, 5.3 and figure 1",
        paper="one curve, stable, above GRPO with replay",
        judge=rules.gspo_needs_none,
    ),
    Claim(
        text="About 10% of activated experts change after each gradient update",
        source=f"{_PAPER}, 5.3 (48 layers)",
        paper=f"roughly {rules.PAPER_CHURN:.0%}",
        judge=rules.churn_after_one_update,
    ),
    Claim(
        text="About 10% of activated experts change over all updates of a rollout",
        source=f"{_PAPER}, 5.3 (48 layers)",
        paper=f"roughly {rules.PAPER_CHURN:.0%}",
        judge=rules.churn_over_rollout,
    ),
    Claim(
        text="The routing change is what makes token ratios fluctuate",
        source=f"{_PAPER}, 5.3",
        paper="stated, no number",
        judge=rules.routing_drives_ratio,
    ),
    Claim(
        text="GSPO clips two orders of magnitude more tokens",
        source=f"{_PAPER}, figure 2",
        paper=f"{PAPER_CLIP_GSPO:g} against {PAPER_CLIP_GRPO:g}",
        judge=rules.gspo_clips_more,
    ),
    Claim(
        text="The volatility is worse in deeper models",
        source=f"{_PAPER}, 5.3",
        paper="stated, no number",
        judge=rules.deeper_is_worse,
        alike=rules.ALIKE,
    ),
    Claim(
        text="The collapse is irreversible, even from an earlier checkpoint",
        source=f"{_PAPER}, 5.3",
        paper="stated, no number",
        judge=rules.collapse_is_irreversible,
    ),
    Claim(
        text="GSPO converges faster than GRPO at equal compute",
        source=f"{_PAPER}, 5.1 and figure 1",
        paper="curves against GRPO with replay",
        judge=rules.gspo_converges_faster,
    ),
    Claim(
        text="GSPO may take the engine's likelihoods as old log-probs",
        source=f"{_PAPER}, 5.4",
        paper="stated, no number",
        judge=rules.tolerates_engine_likelihoods,
    ),
    Claim(
        text="Control: a dense model stays stable in the same setting",
        source="our control",
        paper="not run",
        judge=rules.dense_is_stable,
    ),
    Claim(
        text="Control: with a frozen router the failure goes away",
        source="our control",
        paper="not run",
        judge=rules.frozen_router_is_stable,
    ),
    Claim(
        text="Without its unbounded branch (dual clip) GRPO does not collapse",
        source=_OURS,
        paper="not run",
        judge=rules.bounded_branch_holds,
    ),
    Claim(
        text="The sampling engine's log-probs in the denominator are enough",
        source=_OURS,
        paper="not run",
        judge=rules.sampling_denominator_holds,
    ),
    Claim(
        text="Replay removes the routing part of the ratio's variance",
        source=_OURS,
        paper="not measured",
        judge=rules.replay_removes_routing,
    ),
    Claim(
        text="Without noise GSPO restores a dense model too",
        source=_OURS,
        paper="not run",
        judge=rules.gspo_restores_dense,
    ),
    Claim(
        text="The variance of the sequence ratio falls with response length",
        source=_OURS,
        paper="not measured",
        judge=rules.sequence_variance_falls,
        alike=rules.ALIKE_BUT_LENGTH,
    ),
]

MAIN_CLAIMS = ("grpo_collapses", "replay_restores", "gspo_needs_none")


def _alike(measures: pd.DataFrame, own: pd.DataFrame, columns: tuple[str, ...]) -> pd.DataFrame:
    """The grpo runs of all settings that agree with one setting's in some columns."""
    kinds = own.loc[own["arm"] == "grpo", list(columns)].drop_duplicates()
    return measures[measures["arm"] == "grpo"].merge(kinds)


def claims_table(study: StudyRuns, measures: pd.DataFrame | None = None) -> pd.DataFrame:
    """One row a (setting, claim): our number, its interval, n, the verdict and its reason.

    Columns: setting, key, claim, source, paper, ours, value, low, high, n, verdict, reason, rule.
    Verdicts are computed from complete runs by `Claim.judge`. `measures` is `run_measures(study)`
    where the caller has it already.
    """
    measures = run_measures(study) if measures is None else measures
    measures = measures[measures["complete"]]
    rows = []
    for setting in study.settings:
        for claim in CLAIMS:
            own = measures[measures["setting"] == setting]
            if claim.alike:
                own = _alike(measures, own, claim.alike)
            finding = claim.judge(own)
            rows.append(
                {
                    "setting": setting,
                    "key": claim.key,
                    "claim": claim.text,
                    "source": claim.source,
                    "paper": claim.paper,
                    "ours": finding.ours,
                    **vars(finding.interval),
                    "verdict": finding.verdict,
                    "reason": finding.reason,
                    "rule": claim.rule,
                }
            )
    return pd.DataFrame(rows)


def in_question(claims: pd.DataFrame) -> pd.Series:
    """Whether the question of each row of `claims_table` arises where it was asked: nothing decides
    it beforehand, and there is something to cure.
    """
    return ~claims["reason"].str.contains(f"{NOT_JUDGED}|{STABLE}")


def open_claims(claims: pd.DataFrame) -> list[str]:
    """The main claims in rows of `claims_table` that more seeds may settle: inconclusive over as
    many seeds as a verdict needs.
    """
    asked = claims["key"].isin(MAIN_CLAIMS) & in_question(claims)
    rows = claims[asked & (claims["n"] >= MIN_SEEDS) & (claims["verdict"] == INCONCLUSIVE)]
    return list(dict.fromkeys(rows["claim"]))


def terminal_verdicts(claims: pd.DataFrame) -> str:
    """The rows of `claims_table` that were measured, a line each, for a terminal.

    An inconclusive one says why, and how many seeds would settle it where that can be told.
    """
    lines = []
    for row in claims[claims["n"] > 0].itertuples():
        why = [row.ours, row.reason] if row.verdict == INCONCLUSIVE else [row.ours or row.reason]
        said = "; ".join(text for text in why if text)
        lines.append(f"{row.verdict:<14} {row.setting}: {row.claim} ({said})")
    return "\n".join(lines)
