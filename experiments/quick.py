"""The quick form: do the three main claims hold on this machine? Minutes.

moe-rl reproduce
"""

from collections.abc import Sequence

from moe_rl.config import Family
from moe_rl.experiments.arms import QUICK_ARMS, check_arms
from moe_rl.experiments.study import FIVE_SEEDS, StudyPlan, of_arms, seed_by_seed
from moe_rl.presets import preset


def quick(
    *,
    arms: Sequence[str] = QUICK_ARMS,
    seeds: Sequence[int] = FIVE_SEEDS,
    families: Sequence[Family] = (),
) -> StudyPlan:
    """The arms under routing noise on paired seeds, in one setting or in one for each family.

    Raises:
        ConfigError: see `check_arms`.
    """
    check_arms(arms)
    base = preset("routing-noise")
    settings = [base.replace(setting=family, family=family) for family in families] or [base]
    configs = [config for setting in settings for config in of_arms(setting, arms, seeds)]
    return StudyPlan(name="reproduce", mode="quick", configs=seed_by_seed(configs))
