"""The quick form: do the three main claims hold on this machine? Minutes.

moe-rl reproduce
"""

from collections.abc import Sequence

from moe_rl.config import Family
from moe_rl.experiments.arms import MAIN_ARMS, TWIST_ARM, check_arms
from moe_rl.experiments.study import FIVE_SEEDS, StudyPlan, of_arms, seed_by_seed
from moe_rl.presets import preset

ONE_LOOK = "The three main claims are judged by their rules over the seeds, five by default."
ANALYSIS = f"""{ONE_LOOK}
Where these leave one of them open, as many seeds again are run, once, and all claims are judged
again. Looking twice makes an error more likely: of studies in which a claim stands on the edge of
its rule, 4% call it reproduced (in one look at a mean 2.5%, at a share of five seeds 3%).
"""


def quick(
    *,
    arms: Sequence[str] = (),
    seeds: Sequence[int] = FIVE_SEEDS,
    families: Sequence[Family] = (),
    extend: bool = True,
) -> StudyPlan:
    """The arms under routing noise on paired seeds, in one setting or in one for each family.

    Args:
        arms: by default the main ones, and of the twist's one run beside them: the 15 of five seeds
            leave two cores room for it.
        seeds: of the main arms; the twist's is the first.
        families: by default qwen3_moe alone.
        extend: whether a claim that stays open is judged over more seeds.

    Raises:
        ConfigError: see `check_arms`.
    """
    check_arms(arms)
    base = preset("routing-noise")
    settings = [base.replace(setting=family, family=family) for family in families] or [base]
    configs = [
        config for setting in settings for config in of_arms(setting, arms or MAIN_ARMS, seeds)
    ]
    if not arms:
        configs += of_arms(settings[0], [TWIST_ARM], seeds[:1])
    return StudyPlan(
        name="reproduce",
        mode="quick",
        configs=seed_by_seed(configs),
        analysis=ANALYSIS if extend else ONE_LOOK,
    )


def twice_as_many(seeds: Sequence[int]) -> tuple[int, ...]:
    """The seeds, and as many again that follow the largest."""
    after = max(seeds, default=0) + 1
    return (*seeds, *range(after, after + len(seeds)))
