"""`moe-rl reproduce`: the collapse study."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from moe_rl.commands.options import Command, StudyOptions
from moe_rl.commands.studies import INTERRUPTED, run_study
from moe_rl.config import ConfigError, Family


@dataclass(frozen=True, kw_only=True)
class Reproduce(StudyOptions, Command):
    """Run the collapse experiment and write its report."""

    interrupted: ClassVar[str] = INTERRUPTED

    quick: bool = False
    """Three main arms, two seeds, one setting (the default)."""
    full: bool = False
    """All arms and controls, eight paired seeds, all settings."""
    settings: tuple[str, ...] = ()
    """With --full: the settings to run. Default: staleness, engine-noise, deeper."""
    family: tuple[Family, ...] = ()
    """Model families to compare under engine noise, one setting each, instead of --settings."""
    arms: tuple[str, ...] = ()
    """Arms to compare: names that `moe-rl arms` lists, or your own loss as FILE.py:FUNCTION.
    Default: grpo, grpo+replay, gspo; with --full those of each setting."""
    seeds: tuple[int, ...] = ()
    """Random seeds; every arm runs with each. Default: 6 7, with --full 6 to 13."""
    out: Path | None = None
    """Study folder. Default: runs/collapse-quick, runs/families-full, ..."""

    def run(self) -> int:
        """Run the study that the options name."""
        from moe_rl.experiments import collapse

        if self.quick and self.full:
            raise ConfigError("--quick with --full: choose one")
        if self.settings and (self.family or not self.full):
            raise ConfigError(
                f"settings={self.settings}: these belong to the full study; add --full, without "
                "--family"
            )
        name = "families" if self.family else "collapse"
        root = self.out or Path(f"runs/{name}-{'full' if self.full else 'quick'}")
        if not self.full:
            study = collapse.quick(self.family, self.arms, self.seeds)
        elif self.family:
            study = collapse.full_families(self.family, self.arms, self.seeds)
        else:
            study = collapse.full(root, self.settings, self.arms, self.seeds)
        return run_study(study, root, self)
