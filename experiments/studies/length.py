"""Length: do longer responses help the sequence ratio, and do coarser tokens cost information?

Part 1, settings digits-N: running sums of 8, 16, 32 and 64 digits, so that a response has N + 1
tokens, under the noise of mild-noise, which GRPO stands at 16. The demonstrations slip less often
where they are longer, so that each teacher is right equally often.
Part 2, setting tokens-2: the 16 digits of digits-16 in tokens of 2 digits: equal information in
half as many tokens, each of 100 kinds.
Arms: GRPO, with dual clip, with replay (R3), GSPO. Seeds: 21 to 25.
Primary outcomes: the variance of the sequence ratio at each length (it should fall as 1/N if tokens
were independent), and final reward. Tests: log variance against log N by the slope over the lengths
within each seed, Student's interval; the paired difference of final rewards between tokens of one
and of two digits, exact sign-flip test, Holm's correction over the arms.
"""

from pathlib import Path

from moe_rl.config import RunConfig
from moe_rl.experiments.study import FIVE_SEEDS, Comparison, of_arms
from moe_rl.presets import preset

DIGITS = (8, 16, 32, 64)
ARMS = ("grpo", "grpo+dual-clip", "grpo+replay", "gspo")


def runs(root: Path) -> list[RunConfig]:
    """Both parts."""
    base = preset("mild-noise")
    right = 1 - base.cold_start.slip  # of one digit
    settings = [
        base.replace(
            setting=f"digits-{count}",
            digits=count,
            slip=round(1 - right ** (base.task.digits / count), 4),
        )
        for count in DIGITS
    ]
    settings.append(base.replace(setting="tokens-2", digits_per_token=2))
    return [config for setting in settings for config in of_arms(setting, ARMS, FIVE_SEEDS)]


def tests() -> list[Comparison]:
    """Tokens of two digits against tokens of one."""
    return [Comparison("tokens", ("digits-16", arm), ("tokens-2", arm)) for arm in ARMS]
