"""`moe-rl watch RUN_DIR`: will this run collapse?"""

import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import tyro

from moe_rl.commands.options import Command
from moe_rl.config import ConfigError
from moe_rl.run_folder.log import is_complete

if TYPE_CHECKING:
    from moe_rl.analysis.warning.judge import Verdict
    from moe_rl.analysis.warning.thresholds import Thresholds

_POLL_SECONDS = 1.0
CALM, WARNED = 0, 1


@dataclass(frozen=True, kw_only=True)
class Watch(Command):
    """Say whether a run's first steps foretell a collapse; exit code 1 if they do."""

    interrupted: ClassVar[str] = "the run itself goes on"

    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """Folder of one run, finished or running."""
    follow: bool = False
    """Judge again after every step, until a warning or the end of the run."""
    thresholds: Path | None = None
    """File of `moe-rl warning`. Default: the one that comes with this version."""

    def run(self) -> int:
        """Print the verdict."""
        from moe_rl.analysis.warning.judge import text
        from moe_rl.analysis.warning.thresholds import COMMITTED, read_thresholds

        rules = read_thresholds(self.thresholds or COMMITTED)
        shown = 0
        while True:
            # Before the reading: what is written between the two is then read once more.
            ended = is_complete(self.run_dir) or not self.follow
            verdict = self._judge(rules)
            if verdict is not None and (verdict.steps > shown or ended):
                shown = verdict.steps
                print(text(verdict), flush=True)
                if verdict.warning:
                    return WARNED
            if ended:
                return CALM
            time.sleep(_POLL_SECONDS)

    def _judge(self, rules: "Thresholds") -> "Verdict | None":
        """The verdict by now; None before the first step of a run that is followed."""
        from moe_rl.analysis.data.load import AnalysisWarning, load_study
        from moe_rl.analysis.warning.judge import judge

        with warnings.catch_warnings():
            # A line that is being written looks torn.
            warnings.simplefilter("ignore", AnalysisWarning)
            study = load_study(self.run_dir)
        if len(study.runs) != 1:
            raise ConfigError(
                f"run_dir={str(self.run_dir)!r}: holds {len(study.runs)} runs; give the folder of "
                "one of them"
            )
        if study.steps.empty:
            if self.follow:
                return None
            raise ConfigError(
                f"run_dir={str(self.run_dir)!r}: no step has ended yet; wait, or add --follow"
            )
        return judge(study.steps, study.updates, rules)
