"""`moe-rl reproduce`: the main claims, on this machine."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from moe_rl.commands.options import Command, StudyOptions
from moe_rl.commands.studies import INTERRUPTED, run_study
from moe_rl.config import Family
from moe_rl.experiments.study import FIVE_SEEDS


@dataclass(frozen=True, kw_only=True)
class Reproduce(StudyOptions, Command):
    """Reproduce the collapse and its cures in minutes, and write the report."""

    interrupted: ClassVar[str] = INTERRUPTED

    arms: tuple[str, ...] = ()
    """Arms to compare: names that `moe-rl arms` lists, or your own loss as FILE.py:FUNCTION.
    Default: grpo, grpo+replay, gspo, and one run of grpo+dual-clip."""
    seeds: tuple[int, ...] = FIVE_SEEDS
    """Random seeds; every arm runs with each. A verdict needs five or more."""
    family: tuple[Family, ...] = ()
    """Model families to compare, one setting each. Default: qwen3_moe."""
    out: Path = Path("runs/reproduce")
    """Study folder."""

    def run(self) -> int:
        """Run the study."""
        from moe_rl.experiments.quick import quick

        study = quick(arms=self.arms, seeds=self.seeds, families=self.family)
        return run_study(study, self.out, self)
