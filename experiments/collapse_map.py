"""The collapse map: arms and controls over learning rate x updates per rollout x router noise.

    moe-rl map

One lucky setting proves nothing about stability; the map shows every arm's stability frontier, the
largest learning rate at which the final reward stays within 20% of its peak.
"""

from collections.abc import Sequence

from moe_rl.config import RunConfig
from moe_rl.experiments.arms import check_arms
from moe_rl.experiments.study import StudyPlan, of_arms


def grid(
    *,
    base: RunConfig,
    learning_rates: Sequence[float],
    updates: Sequence[int],
    noises: Sequence[float],
    arms: Sequence[str],
    seeds: Sequence[int],
) -> StudyPlan:
    """The map around `base`.

    Raises:
        ConfigError: an unknown arm, no run at all, or a value that no run can have.
    """
    check_arms(arms)
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
    configs = [
        config
        # A whole seed of the map comes before the next seed.
        for seed in seeds
        for base in bases
        for config in of_arms(base, arms, [seed])
        # Without a choice of experts there is nothing to perturb.
        if not (config.router_noise and config.model.is_dense)
    ]
    return StudyPlan(name="map", mode="map", configs=tuple(configs))
