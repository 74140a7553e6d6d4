"""`moe-rl study`: one of the committed studies."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from moe_rl.commands.options import Command, StudyOptions
from moe_rl.commands.studies import INTERRUPTED, run_study
from moe_rl.config import StudyName


@dataclass(frozen=True, kw_only=True)
class Study(StudyOptions, Command):
    """Run one of the committed studies and write its report; hours on a laptop."""

    interrupted: ClassVar[str] = INTERRUPTED

    name: Annotated[StudyName, tyro.conf.Positional]
    """Study to run; the head of experiments/studies/NAME.py has its question and its tests."""
    seeds: tuple[int, ...] | None = None
    """Run these seeds of the plan alone, in a study folder of their own; `moe-rl pool` joins what
    several machines have run. Default: all of them."""
    arms: tuple[str, ...] | None = None
    """Run these arms alone, in a study folder of their own: of the study, of the table (`moe-rl
    arms`), or your own losses as FILE.py:FUNCTION, wherever the study runs GRPO. Default: all of
    the study's."""
    out: Path | None = None
    """Study folder. Default: runs/NAME."""

    def run(self) -> int:
        """Run the study of that name."""
        from moe_rl.experiments.studies import study_plan

        root = self.out or Path("runs") / self.name
        study = study_plan(self.name, root)
        if self.arms is not None:
            study = study.with_arms(self.arms)
        return run_study(study if self.seeds is None else study.of_seeds(self.seeds), root, self)
