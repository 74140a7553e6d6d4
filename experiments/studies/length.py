"""Length: do longer responses help the sequence ratio, and do coarser tokens cost information?

Part 1, settings digits-N: running sums of 8, 16, 32 and 64 digits, so that a response has N + 1
tokens, under the noise of mild-noise. The demonstrations slip less often where they are longer, so
that each teacher is right equally often. Settings clean-N, which the first seeds showed to be
needed: the same without noise, as noise that is drawn for each token averages out by itself.
Part 2, setting tokens-2: the 16 digits of digits-16 in tokens of 2 digits: equal information in
half as many tokens, each of 100 kinds.
Arms: GRPO, with dual clip, with replay (R3), GSPO; in clean-N GRPO and GSPO. Seeds: 21 to 25.
Primary outcomes: the variance of the sequence ratio at each length without noise (it should fall as
1/N if tokens were independent), and final reward. Tests: log variance against log N by the slope
over the lengths within each seed, Student's interval; the paired difference of final rewards
between tokens of one and of two digits, exact sign-flip test, Holm's correction over the arms; of
five seeds no p falls below 0.06, so that intervals are what is read. Coarser tokens also mean half
as many noisy choices a response.
"""

from pathlib import Path

from moe_rl.config import RunConfig
from moe_rl.experiments.study import FIVE_SEEDS, Comparison, of_arms
from moe_rl.presets import preset

DIGITS = (8, 16, 32, 64)
ARMS = ("grpo", "grpo+dual-clip", "grpo+replay", "gspo")
CLEAN_ARMS = ("grpo", "gspo")


def runs(root: Path) -> list[RunConfig]:
    """All parts."""
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
    coarse = base.replace(setting="tokens-2", digits_per_token=2)
    configs = [c for s in (*settings, coarse) for c in of_arms(s, ARMS, FIVE_SEEDS)]
    for noisy in settings:
        clean = noisy.replace(setting=f"clean-{noisy.task.digits}", router_noise=0.0)
        configs += of_arms(clean, CLEAN_ARMS, FIVE_SEEDS)
    return configs


def tests() -> list[Comparison]:
    """Tokens of two digits against tokens of one."""
    return [Comparison("tokens", ("digits-16", arm), ("tokens-2", arm)) for arm in ARMS]
