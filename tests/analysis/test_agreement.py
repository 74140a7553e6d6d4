"""Agreement of studies from different machines."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from synthetic import MAIN_ARMS, PROFILES, Profile, write_study

from moe_rl.analysis import AnalysisError
from moe_rl.analysis.report.pool import load_measures, pool, write_pool
from moe_rl.analysis.verdicts.agreement import arm_agreement, verdict_agreement
from moe_rl.analysis.verdicts.claims import CLAIMS
from moe_rl.commands.cli import main

SMALL: dict[str, Any] = {"arms": MAIN_ARMS, "steps": 24, "updates": 2}


def test_a_study_agrees_with_itself(tmp_path: Path) -> None:
    study = load_measures(write_study(tmp_path / "a", **SMALL))
    arms = arm_agreement([study, study])
    assert len(arms) == len(MAIN_ARMS) and (arms["difference"] == 0).all()
    assert ((arms["low"] <= 0) & (arms["high"] >= 0)).all()
    claims = verdict_agreement([study, study])
    assert claims["agree"].all() and 0 < len(claims) < len(CLAIMS)  # what was measured


def test_tables_of_a_study_are_compared_as_its_runs_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, tables = write_study(tmp_path / "a", **SMALL), tmp_path / "tables"
    write_pool(*pool([runs]), tables)
    assert main(["compare", str(runs), str(tables)]) == 0
    said = capsys.readouterr().out
    count = len(verdict_agreement([load_measures(runs)]))
    assert f"{count} of {count} verdicts that all measured agree" in said


def test_a_difference_is_welchs_and_another_verdict_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fine = {**PROFILES, "grpo": Profile(plateau=0.9)}
    paths = [
        write_study(tmp_path / "a", **SMALL),
        write_study(tmp_path / "b", profiles=fine, seeds=7, **SMALL),
    ]
    studies = [load_measures(path) for path in paths]
    row = arm_agreement(studies).set_index("arm").loc["grpo"]
    finals = [
        measures[measures["arm"] == "grpo"]["final"].to_numpy(float) for _, measures in studies
    ]
    assert row["difference"] == pytest.approx(finals[1].mean() - finals[0].mean())
    # Welch's interval by its own formula.
    variances = [values.var(ddof=1) / len(values) for values in finals]
    freedom = sum(variances) ** 2 / sum(
        v**2 / (len(f) - 1) for v, f in zip(variances, finals, strict=True)
    )
    half = stats.t.ppf(0.975, freedom) * np.sqrt(sum(variances))
    assert (row["low"], row["high"]) == pytest.approx(
        (row["difference"] - half, row["difference"] + half)
    )
    claims = verdict_agreement(studies).set_index("key")
    assert not claims.loc["grpo_collapses", "agree"]
    assert main(["compare", *map(str, paths)]) == 1
    assert "4 of 8 verdicts that all measured agree" in capsys.readouterr().out


def test_what_cannot_be_compared_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = write_study(tmp_path / "a", **SMALL | {"arms": ["grpo"]})
    other = write_study(tmp_path / "b", **SMALL | {"arms": ["gspo"]})
    with pytest.raises(AnalysisError, match="no setting and arm in common; give studies"):
        arm_agreement([load_measures(one), load_measures(other)])
    assert main(["compare", str(one)]) == 2
    assert "give at least two study folders" in capsys.readouterr().err
