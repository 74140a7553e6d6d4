"""`moe-rl warning`: which signal of the first steps tells a coming collapse?"""

import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from moe_rl.commands.options import Command
from moe_rl.config import SCHEMA, ConfigError
from moe_rl.run_folder.log import check_can_be_made, write_json

if TYPE_CHECKING:
    from moe_rl.analysis.data.load import StudyRuns


@dataclass(frozen=True, kw_only=True)
class Warning(Command):
    """Measure early warnings over studies: AUC, alarms and thresholds of every signal."""

    studies: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="STUDY_DIR")]
    """Study folders; a run that several of them hold counts once."""
    out: Path
    """Folder for the tables, the figure and thresholds.json."""
    horizon: int = 5
    """Steps that thresholds.json is for: 3, 5, 8 or 10."""
    tried: Path | None = None
    """thresholds.json that was chosen on other runs than these, to be tried on them."""

    def run(self) -> int:
        """Write them, and say what predicts."""
        import pandas as pd

        from moe_rl.analysis.plots.warning import auc_by_signal
        from moe_rl.analysis.warning import evaluate
        from moe_rl.analysis.warning.thresholds import make_thresholds, read_thresholds

        if self.horizon not in evaluate.HORIZONS:
            known = ", ".join(map(str, evaluate.HORIZONS))
            raise ConfigError(f"horizon={self.horizon}: not evaluated; use one of {known}")
        check_can_be_made(self.out, "out")
        others = read_thresholds(self.tried) if self.tried else None
        names: list[str] = []
        runs = evaluate.watched_runs(self._one_by_one(names))
        if others is not None:
            rules = {rule.signal: rule.threshold for rule in others.signals}
            tried = evaluate.tried_table(runs, rules, others.horizon)
            self.out.mkdir(parents=True, exist_ok=True)
            tried.to_csv(self.out / "tried.csv", index=False, float_format="%.6g")
            print(f"tried on {len(runs)} runs: {self.out / 'tried.csv'}")
        counted = evaluate.settings_that_count(runs)
        if not counted:
            raise ConfigError(
                f"studies: no setting of {len(runs)} runs has {evaluate.FEWEST} that collapse and "
                f"{evaluate.FEWEST} that do not; give larger studies"
            )
        aucs, left_out = evaluate.auc_table(runs), evaluate.leave_one_out(runs)
        self.out.mkdir(parents=True, exist_ok=True)
        aucs.to_csv(self.out / "auc.csv", index=False, float_format="%.6g")
        left_out.to_csv(self.out / "alarms.csv", index=False, float_format="%.6g")
        stated = evaluate.stated_table(runs)
        stated.to_csv(self.out / "stated.csv", index=False, float_format="%.6g")
        thresholds = make_thresholds(runs, names, self.horizon, aucs, left_out)
        thresholds.write(self.out / "thresholds.json")
        table = [[run.setting, run.arm, run.seed, run.collapse_step] for run in runs]
        columns = ["setting", "arm", "seed", "collapse_step"]
        pd.DataFrame(table, columns=columns).to_csv(self.out / "runs.csv", index=False)
        plan = {"name": "warning", "mode": "warning", "studies": names, "settings": counted}
        about = {"command": shlex.join(["moe-rl", *sys.argv[1:]]), "analysis": evaluate.__doc__}
        write_json(self.out / "study.json", {"schema": SCHEMA} | plan | about)
        auc_by_signal(aucs).savefig(self.out / "auc.png", dpi=200)
        print(f"{len(runs)} runs, {len(counted)} settings with collapses and survivors")
        for horizon, own in aucs.groupby("horizon"):
            for kind, words in (("run", "a run from its siblings"), ("arm", "only the arm")):
                told = ", ".join(own[own["evidence"] == kind]["signal"]) or "nothing"
                print(f"first {horizon} steps, tells {words}: {told}")
        print(f"written: {self.out}")
        return 0

    def _one_by_one(self, names: list[str]) -> "Iterator[StudyRuns]":
        """The studies, one in memory at a time; their names are appended."""
        from moe_rl.analysis.data.load import load_study

        for path in self.studies:
            study = load_study(path)
            names.append(study.name)
            yield study
