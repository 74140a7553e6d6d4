"""Agreement of studies from different machines."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from synthetic import MAIN_ARMS, PROFILES, Profile, write_study

from moe_rl.analysis import AnalysisError, load_study
from moe_rl.analysis.data.measures import run_measures
from moe_rl.analysis.verdicts.agreement import arm_agreement, verdict_agreement
from moe_rl.commands.cli import main

SMALL: dict[str, Any] = {"arms": MAIN_ARMS, "steps": 24, "updates": 2}


def test_a_study_agrees_with_itself(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path / "a", **SMALL))
    arms = arm_agreement([study, study])
    assert len(arms) == len(MAIN_ARMS) and (arms["difference"] == 0).all()
    assert ((arms["low"] <= 0) & (arms["high"] >= 0)).all()
    assert verdict_agreement([study, study])["agree"].all()


def test_a_difference_is_welchs_and_another_verdict_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fine = {**PROFILES, "grpo": Profile(plateau=0.9)}
    paths = [
        write_study(tmp_path / "a", **SMALL),
        write_study(tmp_path / "b", profiles=fine, seeds=7, **SMALL),
    ]
    studies = [load_study(path) for path in paths]
    row = arm_agreement(studies).set_index("arm").loc["grpo"]
    finals = [
        measures[measures["arm"] == "grpo"]["final"].to_numpy(float)
        for measures in map(run_measures, studies)
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
    assert "verdicts agree" in capsys.readouterr().out


def test_what_cannot_be_compared_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = write_study(tmp_path / "a", **SMALL | {"arms": ["grpo"]})
    other = write_study(tmp_path / "b", **SMALL | {"arms": ["gspo"]})
    with pytest.raises(AnalysisError, match="no setting and arm in common; give studies"):
        arm_agreement([load_study(one), load_study(other)])
    assert main(["compare", str(one)]) == 2
    assert "give at least two study folders" in capsys.readouterr().err
