"""The studies: one file a question, with the plan of its analysis at the head, and one command.

    moe-rl study remedies

The docstring of a module is the analysis plan: it was written before the full run, and study.json
keeps it beside the runs. `runs(root)` are the configs; `root` is the study folder, which runs that
start from another run's checkpoint need. `tests()`, where there are any, are the plan's tests
beyond those of arms against GRPO.
"""

import importlib
import inspect
from pathlib import Path

from moe_rl.config import StudyName
from moe_rl.experiments.study import StudyPlan, seed_by_seed


def study_plan(name: StudyName, root: Path) -> StudyPlan:
    """The runs of a study into the folder `root`, whole seeds first."""
    module = importlib.import_module(f"moe_rl.experiments.studies.{name}")
    return StudyPlan(
        name=name,
        mode="full",
        configs=seed_by_seed(module.runs(root)),
        analysis=inspect.getdoc(module) or "",
        tests=tuple(module.tests() if hasattr(module, "tests") else ()),
    )
