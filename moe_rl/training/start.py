"""What a run starts from: its policy, cold-started or loaded, and its resolved clip range."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from moe_rl.config import RunConfig
from moe_rl.losses import resolve_clip
from moe_rl.policy.fit import check_fit
from moe_rl.policy.policy import Policy, build_policy
from moe_rl.runtime.ranks import Ranks
from moe_rl.tasks import make_task
from moe_rl.training.cold_start import ensure_cold_start


def starting_policy(
    config: RunConfig,
    cold_start_cache: Path,
    on_cold_start: Callable[[int, float], None] | None = None,
    *,
    ranks: Ranks | None = None,
    sharded: bool = False,
) -> Policy:
    """The policy every arm and seed starts from: cold-started, or as built or loaded.

    Args:
        config: the run.
        cold_start_cache: folder of all cold starts.
        on_cold_start: called with (supervised step, loss).
        ranks: processes that train together, all of which call this; alone by default. The main one
            makes the cold start: transformers lets no other save a model.
        sharded: see `build_policy`.

    Raises:
        ConfigError: the policy cannot be built, or cannot hold the task's prompts and responses.
        PeerFailed: the main rank could not make the cold start.
    """
    ranks = ranks or Ranks()
    task = make_task(config.task.task, **config.task.options())
    if config.sft_steps:
        for makes in (ranks.main, not ranks.main):  # what one makes, the others find
            with ranks.together():
                if makes:
                    folder = ensure_cold_start(config, task, cold_start_cache, on_cold_start)
        return saved_policy(config, folder, sharded=sharded)
    policy = build_policy(
        config.model,
        task.alphabet,
        seed=config.cold_start.sft_seed,
        temperature=config.temperature,
        sharded=sharded,
    )
    check_fit(policy, task)
    return policy


def saved_policy(config: RunConfig, folder: Path, *, sharded: bool = False) -> Policy:
    """The policy of a run as a folder has it: its cold start, or one of its checkpoints."""
    task = make_task(config.task.task, **config.task.options())
    model = dataclasses.replace(config.model, checkpoint=str(folder))
    return build_policy(model, task.alphabet, temperature=config.temperature, sharded=sharded)


def clip_range(config: RunConfig) -> tuple[float, float]:
    """The run's (clip_low, clip_high); the algorithm's published ones where it leaves them out.

    Raises:
        ValueError: a range of the other algorithm's scale, unless the config allows it.
    """
    return resolve_clip(
        config.algorithm,
        config.clip_low,
        config.clip_high,
        allow_any_scale=config.allow_any_clip_scale,
    )
