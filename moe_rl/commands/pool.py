"""`moe-rl pool FOLDER FOLDER`: seeds of one study that were run apart, as one study."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from moe_rl.commands.options import Command
from moe_rl.config import ConfigError
from moe_rl.run_folder.log import check_can_be_made


@dataclass(frozen=True, kw_only=True)
class Pool(Command):
    """Pool seeds of one study that were run apart: its tables, verdicts and final rewards."""

    parts: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Study folders, or folders of experiments/results; each seed of a setting in one of them, and
    the newest plan last. Of the configs what runs.csv has is compared."""
    out: Path
    """Folder for study.json, the tables and figures; may be a folder of tables of this study."""

    def run(self) -> int:
        """Write them, and print the arms and verdicts."""
        from moe_rl.analysis import terminal_table, terminal_verdicts
        from moe_rl.analysis.report.pool import pool, write_pool
        from moe_rl.analysis.verdicts.agreement import machines

        if not self.parts:
            raise ConfigError("FOLDER: give at least one")
        check_can_be_made(self.out, "out")
        study, plan = pool(self.parts)
        tables = write_pool(study, plan, self.out)
        print(terminal_table(tables["arms"]))
        print(terminal_verdicts(tables["claims"]))
        made_by = machines(study.runs)
        if len(made_by) > 1:
            print(
                f"runs of {len(made_by)} machines ({'; '.join(made_by)}): their cold starts and "
                "rounding differ, which no interval here knows; `moe-rl compare` tells how far"
            )
        print(f"{len(study.runs)} complete runs, tables and figures: {self.out}")
        return 0
