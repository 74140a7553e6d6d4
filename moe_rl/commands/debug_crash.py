"""`moe-rl debug-crash BUNDLE`: where an update that stopped a run first met NaN or inf."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from moe_rl.commands.options import Command


@dataclass(frozen=True, kw_only=True)
class DebugCrash(Command):
    """Redo the update that stopped a run and name where NaN or inf first appears.

    Exit code 1 if everything is finite this time.
    """

    bundle: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="BUNDLE")]
    """Crash bundle that the run left: RUN/crash/STEP-UPDATE."""

    def run(self) -> int:
        """Redo it and print the report."""
        from moe_rl.training.debug_crash import debug_crash

        result = debug_crash(self.bundle)
        print(result.describe())
        return 0 if result.found else 1
