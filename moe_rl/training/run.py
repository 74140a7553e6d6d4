"""One run from its config to its summary: what it starts from, where it is written, who trains.

Everything that can be refused is refused here, before a cold start is trained or a file written.
"""

import contextlib
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moe_rl.config import ConfigError, RunConfig
from moe_rl.run_folder.checkpoints import Checkpoints
from moe_rl.run_folder.log import NoLog, RunLog, check_run_folder, logged_updates
from moe_rl.run_folder.trackers import Tracker
from moe_rl.runtime.process import prepare_process
from moe_rl.runtime.ranks import Ranks, join
from moe_rl.runtime.share import Share
from moe_rl.runtime.stopping import listen
from moe_rl.runtime.wrapped import Parallelism
from moe_rl.training.inputs import check_engine, resolved
from moe_rl.training.start import clip_range, saved_policy, starting_policy
from moe_rl.training.state import POLICY, load_log_marks
from moe_rl.training.trainer import StepCallback, Trainer


def train(
    config: RunConfig,
    folder: Path,
    *,
    cold_start_cache: Path,
    resume: bool = False,
    parallelism: Parallelism = "ddp",
    trackers: Sequence[Tracker] = (),
    on_step: StepCallback | None = None,
    on_cold_start: Callable[[int, float], None] | None = None,
    on_damage: Callable[[str], None] = warnings.warn,
) -> dict[str, Any]:
    """Run `config` into `folder`, from its cold start or from a checkpoint; returns the summary.

    Where torchrun has started several processes, each calls this and they train together.

    Args:
        config: the run.
        folder: its run folder.
        cold_start_cache: folder of all cold starts.
        resume: go on from the newest whole checkpoint in the folder, from the start if there is
            none. The rest of the run is bitwise that of one which was never interrupted, on equally
            many processes.
        parallelism: how processes share the policy.
        trackers: show the lines of the logs, of the main rank; see moe_rl/run_folder/trackers.py.
        on_step: called with the metrics of each rollout step.
        on_cold_start: called with (supervised step, loss).
        on_damage: told about each checkpoint that had to be passed over, and of a run that starts
            anew for want of one.

    Raises:
        ConfigError: the folder holds another run, or checkpoints of this one without `resume`; or
            the policy cannot be built.
        ValueError: a clip range of the other algorithm's scale.
        NonFinite, Stopped: see `Trainer.run`.
        PeerFailed: another process has failed.
    """
    config = resolved(config)
    clip_range(config)  # refused here, before a cold start is trained
    check_engine(config)  # the same
    with join() as ranks:
        prepare_process(config.num_threads)
        _check_processes(config, ranks)
        check_run_folder(folder, config)
        identity = json.dumps(config.to_dict(), sort_keys=True)
        checkpoints = Checkpoints(folder / "checkpoints", identity=identity)
        checkpoint = checkpoints.newest(on_damage if resume else _refuse_to_start_over)
        if checkpoint is not None and not resume:
            _refuse_to_start_over(str(checkpoint.path))
        made = logged_updates(folder) if resume and checkpoint is None else 0
        if made:
            on_damage(
                f"{folder}: no checkpoint to go on from; the run starts anew, and its {made} "
                "logged updates are made again"
            )
        # Before anything is written: a folder of a run that could not start would be in the way.
        sharded = parallelism == "fsdp" and ranks.size > 1
        if checkpoint is None:
            policy = starting_policy(
                config, cold_start_cache, on_cold_start, ranks=ranks, sharded=sharded
            )
        else:
            policy = saved_policy(config, checkpoint.path / POLICY, sharded=sharded)
        log: RunLog | NoLog = NoLog(folder)
        with ranks.together():
            if ranks.main:
                checkpoints.set_damaged_aside()
                marks = None if checkpoint is None else load_log_marks(checkpoint.path)
                log = RunLog(folder, config, marks, trackers)
        with contextlib.closing(log), listen() as stop:
            trainer = Trainer(
                config, policy, log, checkpoints, ranks=ranks, parallelism=parallelism, stop=stop
            )
            if checkpoint is not None:
                trainer.go_on_from(checkpoint)
            return trainer.run(on_step if ranks.main else None)


def _check_processes(config: RunConfig, ranks: Ranks) -> None:
    """Refuse what cannot work on several processes, before any work."""
    Share.of(config, ranks.rank, ranks.size)
    device = config.model.device
    if ranks.size > 1 and ":" in device:
        raise ConfigError(
            f"device={device!r} on {ranks.size} processes: all would share it; use "
            f"{device.partition(':')[0]}, and each takes the one of its local rank"
        )
    if ranks.size > 1 and config.engine == "vllm":
        raise ConfigError(
            f"engine='vllm' on {ranks.size} processes: each would build an engine of its own on "
            "the same GPU; use one process, or engine='cached'"
        )


def _refuse_to_start_over(found: str) -> None:
    raise ConfigError(
        f"{found}: a checkpoint of this run; add --resume to go on from it, or give another folder"
    )
