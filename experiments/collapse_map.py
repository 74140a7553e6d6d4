"""The collapse map: arms and controls over learning rate x updates per rollout x router noise.

    moe-rl map

One lucky setting proves nothing about stability; the map shows every arm's stability frontier, the
largest learning rate at which the final reward stays within 20% of its peak.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_rl.config import ConfigError, RunConfig
from moe_rl.experiments.arms import ARMS, arm_config
from moe_rl.experiments.collapse import write_study


@dataclass(frozen=True, kw_only=True)
class MapStudy:
    """Every combination of settings, arms and seeds."""

    bases: tuple[RunConfig, ...]
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    mode: str = "map"

    def configs(self) -> list[RunConfig]:
        """One config a run; a whole seed of the map comes before the next seed."""
        return [
            arm_config(arm, base, replay="R3" if base.router_noise else "R2", seed=seed)
            for seed in self.seeds
            for base in self.bases
            for arm in self.arms
            # Without a choice of experts there is nothing to perturb.
            if not (arm == "dense" and base.router_noise)
        ]

    def write(self, root: Path, command: str) -> None:
        """Write study.json."""
        settings = tuple(base.setting for base in self.bases)
        write_study(root, "map", self.mode, settings, self.arms, self.seeds, command)


def grid(
    *,
    base: RunConfig,
    learning_rates: Sequence[float],
    updates: Sequence[int],
    noises: Sequence[float],
    arms: Sequence[str],
    seeds: Sequence[int],
) -> MapStudy:
    """The map around `base`.

    Raises:
        ConfigError: an unknown arm, an empty axis, or a value that no run can have.
    """
    axes = {"learning_rates": learning_rates, "updates": updates, "noises": noises}
    for name, values in (axes | {"arms": arms, "seeds": seeds}).items():
        if not values:
            raise ConfigError(f"{name}: give at least one value")
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown:
        raise ConfigError(f"arms={unknown}: expected some of {', '.join(ARMS)}")
    bases = [
        base.replace(
            setting=f"{base.setting}_lr{rate:g}_m{count}_noise{noise:g}",
            learning_rate=rate,
            updates_per_rollout=count,
            router_noise=noise,
        )
        for noise in noises
        for count in updates
        for rate in learning_rates
    ]
    return MapStudy(bases=tuple(bases), arms=tuple(arms), seeds=tuple(seeds))
