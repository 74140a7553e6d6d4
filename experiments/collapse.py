"""The collapse experiment: the arms on paired seeds, in one setting or in all, then the report.

moe-rl reproduce --quick     three arms, two seeds, one setting: minutes
moe-rl reproduce --full      all arms and controls, eight seeds, all settings
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_rl.config import ConfigError, Family, RoutingReplay, RunConfig, preset
from moe_rl.experiments.arms import (
    FRESH_ARMS,
    MAIN_ARMS,
    RESTART_STEP,
    RESTARTS,
    STORY_ARMS,
    arm_config,
    check_arms,
    restart_config,
)
from moe_rl.experiments.runner import run_folder
from moe_rl.experiments.study import StudyPlan

# Seeds 1 to 5 were looked at while the settings were chosen; these were not.
_SEEDS = tuple(range(6, 14))
_FAMILY_SEEDS = 5
# Router noise at which two passes of the family's cold start differ at 94% of the tokens, as R3
# (arXiv 2510.11370) reports of two engines: moe-rl calibrate --of tokens --family FAMILY.
_FAMILY_NOISE: dict[Family, float] = {
    "qwen3_moe": 0.161,
    "olmoe": 0.194,
    "mixtral": 0.127,
    "deepseek_v3": 0.127,
    "gpt_oss": 0.121,
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What one setting of the full study varies, and the arms that it needs."""

    base: RunConfig
    arms: tuple[str, ...]
    replay: RoutingReplay


def settings() -> dict[str, Setting]:
    """The settings of the full study by name.

    R2 replays the trainer's own old choice: the answer to staleness. Where two engines differ, the
    record that both can share is the rollout engine's: R3.
    """
    staleness, noise = preset("staleness"), preset("engine-noise")
    deeper = staleness.replace(setting="deeper", num_layers=2 * staleness.model.num_layers)
    return {
        "staleness": Setting(base=staleness, arms=FRESH_ARMS, replay="R2"),
        "engine-noise": Setting(base=noise, arms=(*FRESH_ARMS, *RESTARTS), replay="R3"),
        # For the claim that churn grows with depth; the others tell whose failure grows too.
        "deeper": Setting(base=deeper, arms=STORY_ARMS, replay="R2"),
    }


def family_settings(families: Sequence[Family]) -> dict[str, Setting]:
    """The setting `engine-noise` for model families, each with its own noise, by family."""
    noise = preset("engine-noise")
    return {
        family: Setting(
            base=noise.replace(setting=family, family=family, router_noise=_FAMILY_NOISE[family]),
            arms=STORY_ARMS,
            replay="R3",
        )
        for family in families
    }


def quick(
    families: Sequence[Family] = (), arms: Sequence[str] = (), seeds: Sequence[int] = ()
) -> StudyPlan:
    """The three main arms, or `arms`, under engine noise, on the full study's first two seeds.

    One setting for each of `families`; without any, the setting `engine-noise` of the full study.

    Raises:
        ConfigError: see `check_arms`.
    """
    check_arms(arms)
    chosen = family_settings(families) or {"engine-noise": settings()["engine-noise"]}
    configs = [
        config
        for setting in chosen.values()
        for seed in seeds or _SEEDS[:2]
        for config in _arm_configs(setting, arms or MAIN_ARMS, seed)
    ]
    name = "families" if families else "collapse"
    return StudyPlan(name=name, mode="quick", configs=tuple(configs))


def full_families(
    families: Sequence[Family], arms: Sequence[str] = (), seeds: Sequence[int] = ()
) -> StudyPlan:
    """The main arms and the dense control, or `arms`, under engine noise, a setting a family.

    Raises:
        ConfigError: see `check_arms`.
    """
    check_arms(arms)
    configs = [
        config
        for seed in seeds or _SEEDS[:_FAMILY_SEEDS]
        for setting in family_settings(families).values()
        for config in _arm_configs(setting, arms or setting.arms, seed)
    ]
    return StudyPlan(name="families", mode="full", configs=tuple(configs))


def full(
    root: Path, names: Sequence[str], arms: Sequence[str] = (), seeds: Sequence[int] = ()
) -> StudyPlan:
    """All arms and both controls, or `arms`, on eight paired seeds, or `seeds`.

    Args:
        root: the study folder; restarted runs load what other runs of the study save there.
        names: settings to run, some of `settings()`; none: all.

    Raises:
        ConfigError: a setting that the study does not have, or see `check_arms`.
    """
    check_arms(arms)
    known = settings()
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise ConfigError(f"settings={name!r}: expected some of {', '.join(known)}{hint}")
    # Seed by seed, so that an interrupted study has whole pairs.
    configs = [
        config
        for name in names or known
        for seed in seeds or _SEEDS
        for config in _of_seed(known[name], arms or known[name].arms, seed, root)
    ]
    return StudyPlan(name="collapse", mode="full", configs=tuple(configs))


def _arm_configs(setting: Setting, arms: Sequence[str], seed: int) -> list[RunConfig]:
    return [arm_config(arm, setting.base, replay=setting.replay, seed=seed) for arm in arms]


def _of_seed(setting: Setting, arms: Sequence[str], seed: int, root: Path) -> list[RunConfig]:
    fresh = [arm for arm in arms if arm not in RESTARTS]
    configs = dict(zip(fresh, _arm_configs(setting, fresh, seed), strict=True))
    restarts = [arm for arm in arms if arm in RESTARTS]
    if restarts:
        original = configs["grpo"] = configs["grpo"].replace(save_every=RESTART_STEP)
        folder = run_folder(root, original)
        configs |= {arm: restart_config(arm, original, folder) for arm in restarts}
    return list(configs.values())
