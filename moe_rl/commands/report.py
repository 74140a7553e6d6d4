"""`moe-rl report RUN_DIR`: the report of a study or a run, from its files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from moe_rl.commands.options import Command
from moe_rl.commands.studies import report_study


@dataclass(frozen=True, kw_only=True)
class Report(Command):
    """Rewrite the report, figures and tables of a study from its files."""

    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """Study folder or run folder."""

    def run(self) -> int:
        """Write it."""
        report_study(self.run_dir)
        return 0
