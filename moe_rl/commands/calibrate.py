"""`moe-rl calibrate`: the router noise that stands for a given difference between two engines."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from moe_rl.commands.options import COLD_STARTS, BaseSettings, Command
from moe_rl.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class Calibrate(BaseSettings, Command):
    """Find the router noise at which two passes disagree on a given share of routers or tokens."""

    settings: Annotated[RunConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=RunConfig)
    of: Literal["routers", "tokens"] = "routers"
    """routers: (token, layer) pairs whose expert sets differ; tokens: those with any such layer."""
    share: float | None = None
    """Share that should disagree, between 0 and 1. Default (R3, arXiv 2510.11370): 0.1 or 0.94."""
    cold_start_cache: Path = COLD_STARTS
    """Folder of cold starts."""

    def run(self) -> int:
        """Print the noise."""
        from moe_rl.experiments.calibrate import calibrate_noise

        result = calibrate_noise(self.settings, self.cold_start_cache, of=self.of, share=self.share)
        print(result.describe())
        return 0
