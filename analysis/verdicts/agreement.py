"""How far studies of the same runs agree that were made on different machines.

Sums round differently elsewhere, and runs are chaotic: single runs cannot be compared, only what
they say together. Arms are compared by their final rewards, claims by their verdicts.
"""

from collections.abc import Sequence

import pandas as pd
from scipy import stats

from moe_rl.analysis.data.load import AnalysisError, StudyRuns
from moe_rl.analysis.data.stats import LEVEL, finite
from moe_rl.analysis.verdicts.claims import claims_table

Measured = tuple[StudyRuns, pd.DataFrame]
"""A study and its `run_measures`."""


def machines(measures: pd.DataFrame) -> list[str]:
    """The machines that made the complete runs of a study, as far as they are recorded."""
    found = measures.loc[measures["complete"], "machine"].dropna()
    return sorted(set(found) - {""})


def arm_agreement(studies: Sequence[Measured]) -> pd.DataFrame:
    """One row a (setting, arm) that all studies have complete runs of.

    Columns: setting, arm, `final_i` the mean final reward of study i, `seeds_i`, and of the last
    study minus the first `difference` with Welch's 95% interval `low` to `high`; NaN bounds below
    two seeds.

    Raises:
        AnalysisError: the studies have no setting and arm in common.
    """
    finals = []
    for _, measures in studies:
        done = measures[measures["complete"]]
        finals.append({key: finite(own) for key, own in done.groupby(["setting", "arm"])["final"]})
    common = [key for key in finals[0] if all(key in other for other in finals)]
    if not common:
        paths = ", ".join(str(study.path) for study, _ in studies)
        raise AnalysisError(f"{paths}: no setting and arm in common; give studies of the same runs")
    rows = []
    for setting, arm in common:
        own = [found[setting, arm] for found in finals]
        row = {"setting": setting, "arm": arm}
        for number, values in enumerate(own, 1):
            row |= {f"final_{number}": values.mean(), f"seeds_{number}": len(values)}
        interval = stats.ttest_ind(own[-1], own[0], equal_var=False).confidence_interval(LEVEL)
        row |= {"difference": own[-1].mean() - own[0].mean()}
        rows.append(row | {"low": interval.low, "high": interval.high})
    return pd.DataFrame(rows)


def verdict_agreement(studies: Sequence[Measured]) -> pd.DataFrame:
    """One row a (setting, claim) that all studies measured: `verdict_i` of study i, and whether
    they agree.
    """
    keys = ["setting", "key", "claim"]
    claims = [claims_table(study, measures) for study, measures in studies]
    tables = [table[table["n"] > 0].set_index(keys)["verdict"] for table in claims]
    joined = pd.concat(
        tables, axis=1, join="inner", keys=[f"verdict_{n}" for n in range(1, len(tables) + 1)]
    )
    joined["agree"] = joined.nunique(axis=1) == 1
    return joined.reset_index()
