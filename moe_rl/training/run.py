"""Train one run, from its config to its summary; every config is resolved and checked here.

Whatever can be refused is refused before a cold start is trained or a file written. torch is
imported late: a wrong option is found in a fraction of a second.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_rl.config import ConfigError, RunConfig
from moe_rl.policy.folder import check_model_folder, find_model
from moe_rl.run_folder.checkpoints import Checkpoints
from moe_rl.run_folder.log import (
    UPDATES,
    NoLog,
    RunLog,
    check_run_folder,
    is_complete,
    lock_run_folder,
)
from moe_rl.run_folder.trackers import Tracker
from moe_rl.tasks import Dataset, Task, task_of

if TYPE_CHECKING:
    from moe_rl.runtime.ranks import Ranks
    from moe_rl.runtime.wrapped import Parallelism
    from moe_rl.training.trainer import StepCallback


def resolve(config: RunConfig) -> RunConfig:
    """The run with its arm named; its datasets, loss and reward pinned to what their files hold.

    Raises:
        ConfigError: a dataset, a loss or a reward that cannot be read or used, or was changed
            since the config was written.
        ValueError: see `loss_options` in training/learner.py.
    """
    return _resolve(config)[0]


def idle(config: RunConfig) -> str | None:
    """What of a resolved config changes nothing, in a sentence; None where all of it matters."""
    from moe_rl.losses.custom import choose_algorithm

    algorithm = choose_algorithm(config.algorithm, config.loss, config.loss_sha256)
    if algorithm.weighs_engine and config.old_logprobs == "rollout":
        return (
            f"algorithm={config.algorithm} with old_logprobs=rollout is GRPO: what it weighs, the "
            "trainer's old log-probs over the engine's, is 1; use old_logprobs=trainer"
        )
    name = f"algorithm={config.algorithm}" if config.loss is None else f"loss={config.loss}"
    replays = config.routing_replay != "disabled"
    if config.model.checkpoint is None and config.model.is_dense:
        fix = "no router chooses; use num_experts above experts_per_token"
        if algorithm.reads_routers:
            return f"{name} on a dense model reads routers that never move: {fix}"
        if replays:
            return f"routing_replay={config.routing_replay} on a dense model replays nothing: {fix}"
    return None


def _resolve(config: RunConfig) -> tuple[RunConfig, Task]:
    """The resolved run and its task, which reads the dataset once for both."""
    config = config.named()
    task = task_of(config.task)
    if isinstance(task, Dataset):
        if config.sft_steps and task.unanswered is not None:
            raise ConfigError(
                f"{task.unanswered}: no answer that a cold start could imitate; use sft_steps=0"
            )
        pinned = dataclasses.replace(config.task, **task.pinned())
        config = dataclasses.replace(config, task=pinned)
    from moe_rl.losses.custom import check_loss, choose_algorithm
    from moe_rl.training.learner import loss_options

    algorithm = choose_algorithm(config.algorithm, config.loss, config.loss_sha256)
    options = loss_options(config, algorithm)
    if config.loss is not None:
        check_loss(config.loss, algorithm, options)
    return dataclasses.replace(config, loss_sha256=algorithm.sha256), task


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

    Where torchrun has started several processes, each calls this and they train together. A run
    that is complete is left as it is.

    Args:
        cold_start_cache: folder of all cold starts.
        resume: continue from the newest whole checkpoint in the folder, from the start if there is
            none. The rest of the run is bitwise that of one which was never interrupted, on equally
            many processes.
        parallelism: how processes share the policy.
        trackers: show the lines of the logs, of the main rank; see moe_rl/run_folder/trackers.py.
        on_step: called with the metrics of each rollout step.
        on_cold_start: called with (supervised step, loss).
        on_damage: told about each damaged checkpoint, and of a run that starts anew without one.

    Raises:
        ConfigError: the folder is in use, holds another run, or checkpoints of this one without
            `resume`; or the policy cannot be built.
        ValueError: see `loss_options` in training/learner.py.
        NonFinite, Stopped: see `Trainer.run`.
        PeerFailed: another process has failed.
    """
    config, task = _resolve(config)
    _check_files(config, folder, resume=resume)
    if is_complete(folder):
        summary: dict[str, Any] = json.loads((folder / "summary.json").read_text("utf-8"))
        return summary

    from moe_rl.rollout.engine import check_engine
    from moe_rl.runtime.process import prepare_process
    from moe_rl.runtime.ranks import join
    from moe_rl.runtime.stopping import listen
    from moe_rl.runtime.wrapped import check_can_be_sharded
    from moe_rl.training.cold_start import saved_policy, starting_policy
    from moe_rl.training.state import POLICY, load_progress
    from moe_rl.training.trainer import Trainer

    with join() as ranks, contextlib.ExitStack() as stack:
        prepare_process(config.num_threads)
        _check_processes(config, folder, ranks)
        checkpoints = Checkpoints(folder / "checkpoints")
        checkpoint = _find_checkpoint(checkpoints, folder, on_damage if resume else None)
        # The log comes after whatever may refuse the policy: a config that cannot start leaves no
        # run in the folder.
        sharded = parallelism == "fsdp" and ranks.size > 1
        if checkpoint is None:
            policy = starting_policy(
                config, task, cold_start_cache, on_cold_start, ranks=ranks, sharded=sharded
            )
        else:
            policy = saved_policy(config, task, checkpoint / POLICY, sharded=sharded)
        check_engine(config.engine, policy.model, config.rollout_precision)
        if sharded:
            check_can_be_sharded(policy.model)
        log: RunLog | NoLog = NoLog(folder)
        with ranks.together():
            if ranks.main:
                stack.enter_context(lock_run_folder(folder))
                done_steps = 0 if checkpoint is None else load_progress(checkpoint).step
                log = RunLog(folder, config, trackers, done_steps=done_steps)
        with contextlib.closing(log), listen() as stop:
            trainer = Trainer(
                config,
                policy,
                task,
                log,
                checkpoints,
                ranks=ranks,
                parallelism=parallelism,
                stop=stop,
            )
            if checkpoint is not None:
                trainer.resume_from(checkpoint)
            return trainer.run(on_step if ranks.main else None)


def _check_files(config: RunConfig, folder: Path, *, resume: bool) -> None:
    """Refuse packages, model folders and run folders that cannot be used, without torch."""
    if config.engine == "vllm":
        from moe_rl.rollout.vllm import import_vllm

        import_vllm()
    where = config.model.checkpoint
    if where is not None and not resume:  # a resumed run reads a checkpoint of its own
        check_model_folder(find_model(where), f"checkpoint={where!r}")
    check_run_folder(folder, config)


def _check_processes(config: RunConfig, folder: Path, ranks: Ranks) -> None:
    """Refuse what several processes cannot share, before any work."""
    from moe_rl.training.share import Share

    with ranks.together():
        if ranks.main and folder.exists():  # a folder made now would stay if the run cannot start
            lock_run_folder(folder).release()
    Share(config, ranks.rank, ranks.size)
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


def _find_checkpoint(
    checkpoints: Checkpoints, folder: Path, on_damage: Callable[[str], None] | None
) -> Path | None:
    """The checkpoint to resume from; a run that is not resumed (no `on_damage`) may have none."""
    if on_damage is None and (found := checkpoints.newest_first()):
        raise ConfigError(
            f"{found[0]}: a checkpoint of this run; add --resume to continue from it, or give "
            "another folder"
        )
    checkpoint = None if on_damage is None else checkpoints.newest(on_damage)
    if on_damage is not None and checkpoint is None and (folder / UPDATES).exists():
        on_damage(f"{folder}: no checkpoint to resume from; the run starts anew")
    return checkpoint
