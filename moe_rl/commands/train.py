"""`moe-rl train`: one run."""

import contextlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from moe_rl.commands.messages import complain, is_main_rank, say
from moe_rl.commands.options import COLD_STARTS, BaseSettings, Command
from moe_rl.config import RunConfig
from moe_rl.metrics.names import Dialect
from moe_rl.run_folder.trackers import TrackerName, make_trackers
from moe_rl.runtime.stopping import Stopped


@dataclass(frozen=True, kw_only=True)
class Train(BaseSettings, Command):
    """Train one run."""

    interrupted: ClassVar[str] = (
        "the same command starts anew, or with --resume from the last checkpoint"
    )

    settings: Annotated[RunConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=RunConfig)
    out: Path | None = None
    """Run folder. Default: runs/SETTING-ARM-seedN."""
    tracker: tuple[TrackerName, ...] = ()
    """Experiment trackers that get the metrics too; wandb runs offline by default."""
    names: Dialect | None = None
    """Names under which trackers show metrics that other trainers log too. Default: ours."""
    resume: bool = False
    """Continue from the newest intact checkpoint in the run folder (see --checkpoint-every)."""
    parallelism: Literal["ddp", "fsdp"] = "ddp"
    """How the processes of torchrun share the policy: replicated (ddp) or sharded (fsdp)."""
    cold_start_cache: Path = COLD_STARTS
    """Folder of cold starts."""
    dry_run: bool = False
    """Print the resolved config as JSON and exit."""

    def run(self) -> int:
        """Check, train, and print where the results are."""
        from moe_rl.commands.progress import print_cold_start, run_progress
        from moe_rl.run_folder.log import is_complete, run_name
        from moe_rl.training.run import idle, resolve, train

        config = resolve(self.settings)
        if self.dry_run:
            print(json.dumps(config.to_dict(), indent=2))
            return 0
        if (note := idle(config)) and is_main_rank():
            complain(note)
        folder = self.out or Path("runs") / run_name(config)
        complete = is_complete(folder)  # training such a run changes nothing
        try:
            trackers = make_trackers(self.tracker, self.names)
            with contextlib.ExitStack() as stack:
                # Of several processes one talks to the user.
                on_step = stack.enter_context(run_progress(config)) if is_main_rank() else None
                summary = train(
                    config,
                    folder,
                    cold_start_cache=self.cold_start_cache,
                    resume=self.resume,
                    parallelism=self.parallelism,
                    trackers=trackers,
                    on_step=on_step,
                    on_cold_start=print_cold_start,
                    on_damage=complain if is_main_rank() else lambda _: None,
                )
        except Stopped as stopped:
            complain(f"{stopped}; the same command with --resume continues from it")
            return 128 + stopped.number
        if complete:
            say(f"{folder}: this run is complete already")
            return 0
        say(f"final reward {summary['final_reward']:.3f} in {summary['seconds']:.0f} s: {folder}")
        return 0
