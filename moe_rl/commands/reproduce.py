"""`moe-rl reproduce`: the main claims, on this machine."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from moe_rl.commands.options import Command, StudyOptions
from moe_rl.commands.studies import INTERRUPTED, run_study
from moe_rl.config import ConfigError, Family
from moe_rl.experiments.study import FIVE_SEEDS


@dataclass(frozen=True, kw_only=True)
class Reproduce(StudyOptions, Command):
    """Reproduce the collapse and its cures in minutes, and write the report."""

    interrupted: ClassVar[str] = INTERRUPTED

    arms: tuple[str, ...] | None = None
    """Arms to compare: names that `moe-rl arms` lists, or your own loss as FILE.py:FUNCTION.
    Default: grpo, grpo+replay, gspo, and one run of grpo+dual-clip."""
    seeds: tuple[int, ...] = FIVE_SEEDS
    """Random seeds; every arm runs with each. A verdict needs five or more."""
    family: tuple[Family, ...] = ()
    """Model families to compare, one setting each. Default: qwen3_moe."""
    extend: bool = True
    """Where five seeds or more leave a main claim open, run as many again, once."""
    out: Path = Path("runs/reproduce")
    """Study folder."""

    def run(self) -> int:
        """Run the study, and once more as many seeds where these leave a main claim open."""
        import pandas as pd

        from moe_rl.analysis import open_claims
        from moe_rl.experiments.quick import twice_as_many
        from moe_rl.experiments.study import read_plan

        if self.arms == ():
            raise ConfigError("arms: none is given; name some, or leave the option out")
        more = twice_as_many(self.seeds)
        if read_plan(self.out).get("seeds") == list(more):  # an earlier call went on
            return self._run(more)
        failed = self._run(self.seeds)
        if failed or self.dry_run:
            return failed
        still_open = open_claims(pd.read_csv(self.out / "report" / "data" / "claims.csv"))
        if not still_open:
            return 0
        print(f"open after {len(self.seeds)} seeds: {'; '.join(still_open)}")
        if not self.extend:
            print(f"more may settle it: --seeds {' '.join(map(str, more))}")
            return 0
        print(f"running seeds {' '.join(map(str, more[len(self.seeds) :]))} too", flush=True)
        return self._run(more)

    def _run(self, seeds: tuple[int, ...]) -> int:
        from moe_rl.experiments.quick import quick

        study = quick(arms=self.arms or (), seeds=seeds, families=self.family, extend=self.extend)
        return run_study(study, self.out, self)
