"""`moe-rl reproduce` goes on where its seeds leave a main claim open."""

import re
from pathlib import Path

import pandas as pd
import pytest

from moe_rl.commands import reproduce
from moe_rl.commands.options import StudyOptions
from moe_rl.config import ConfigError
from moe_rl.experiments.quick import quick
from moe_rl.experiments.study import StudyPlan

FIVE, TEN = [1, 2, 3, 4, 5], list(range(1, 11))


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The seeds of each look at the claims, of which no run is made: 4 of 5 runs collapse, and of
    ten seeds 9.
    """
    done: list[list[int]] = []

    def run_study(study: StudyPlan, root: Path, options: StudyOptions) -> int:
        done.append(sorted({config.seed for config in study.configs}))
        if options.dry_run:
            return 0
        study.write(root, "moe-rl reproduce")
        verdict = "reproduced" if len(done[-1]) == len(TEN) else "inconclusive"
        row = {"key": "grpo_collapses", "claim": "GRPO collapses", "verdict": verdict}
        (root / "report" / "data").mkdir(parents=True, exist_ok=True)
        table = pd.DataFrame([row | {"n": len(done[-1]), "reason": "4 of 5"}])
        table.to_csv(root / "report" / "data" / "claims.csv")
        return 0

    monkeypatch.setattr(reproduce, "run_study", run_study)
    return done


def test_an_open_claim_is_judged_once_more_over_as_many_seeds_again(
    tmp_path: Path, looks: list[list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    command = reproduce.Reproduce(seeds=tuple(FIVE), out=tmp_path / "study")
    assert command.run() == 0
    assert looks == [FIVE, TEN]
    said = capsys.readouterr().out
    assert said == "open after 5 seeds: GRPO collapses\nrunning seeds 6 7 8 9 10 too\n"
    assert command.run() == 0, "the same command finds the ten seeds and goes on with them"
    assert looks == [FIVE, TEN, TEN]


def test_without_more_seeds_it_says_which_would_continue(
    tmp_path: Path, looks: list[list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "study"
    assert reproduce.Reproduce(seeds=tuple(FIVE), out=out, extend=False).run() == 0
    assert looks == [FIVE]
    (named,) = re.findall(r"--seeds ([\d ]+)", capsys.readouterr().out)
    assert [int(seed) for seed in named.split()] == TEN
    quick(seeds=TEN).write(out, "moe-rl reproduce")  # the plan that is named goes on there


def test_no_seeds_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run is left: give at least one arm and one seed"):
        reproduce.Reproduce(seeds=(), out=tmp_path / "study").run()


def test_a_plan_of_nothing_is_not_taken_for_this_study(tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds a study with name=None"):
        quick().write(tmp_path, "moe-rl reproduce")


def test_a_dry_run_and_too_few_seeds_are_one_look(tmp_path: Path, looks: list[list[int]]) -> None:
    reproduce.Reproduce(seeds=tuple(FIVE), out=tmp_path / "a", dry_run=True).run()
    reproduce.Reproduce(seeds=(7, 3), out=tmp_path / "b").run()
    assert looks == [FIVE, [3, 7]]
