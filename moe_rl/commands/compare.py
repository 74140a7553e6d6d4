"""`moe-rl compare STUDY STUDY`: do two machines tell the same story?"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from moe_rl.commands.options import Command
from moe_rl.config import ConfigError


@dataclass(frozen=True, kw_only=True)
class Compare(Command):
    """Compare studies of the same runs that were made on different machines."""

    studies: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="STUDY ...")]
    """Study folders, or folders with the tables of one, two or more."""

    def run(self) -> int:
        """Print both tables; exit code 1 if a verdict differs."""
        if len(self.studies) < 2:
            raise ConfigError(f"studies={len(self.studies)}: give at least two study folders")
        from moe_rl.analysis.report.pool import load_measures
        from moe_rl.analysis.verdicts.agreement import arm_agreement, machines, verdict_agreement

        loaded = [load_measures(path) for path in self.studies]
        for number, (study, measures) in enumerate(loaded, 1):
            made_by = " and ".join(machines(measures)) or "machine not recorded"
            print(f"{number}: {study.path} ({made_by})")
        arms = arm_agreement(loaded)
        print(arms.to_string(index=False, float_format="{:.3f}".format))
        claims = verdict_agreement(loaded)
        print(claims.drop(columns="key").to_string(index=False))
        agreed = int(claims["agree"].sum())
        print(f"{agreed} of {len(claims)} verdicts that all measured agree")
        return 0 if agreed == len(claims) else 1
