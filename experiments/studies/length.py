"""Length: do longer responses help the sequence ratio, and do coarser tokens cost information?

Part 1, settings digits-N: running sums of 8, 16, 32 and 64 digits, so that a response has N + 1
tokens, under noise 0.38.
Part 2, settings tokens-K: the same 16 digits in tokens of K = 1 or 2 digits: equal information in
half as many tokens, each of 100 kinds.
Arms: GRPO, with dual clip, with replay (R3), GSPO. Seeds: 21 to 25.
Primary outcomes: the variance of the sequence ratio at each length (it should fall as 1/N if tokens
were independent), and final reward. Tests: log variance against log N by the slope over the lengths
within each seed, Student's interval; the paired difference of final rewards between K = 1 and 2,
exact sign-flip test, Holm's correction over the arms.
"""

from pathlib import Path

from moe_rl.config import RunConfig
from moe_rl.experiments.study import FIVE_SEEDS, of_arms
from moe_rl.presets import preset

DIGITS = (8, 16, 32, 64)
ARMS = ("grpo", "grpo+dual-clip", "grpo+replay", "gspo")


def runs(root: Path) -> list[RunConfig]:
    """Both parts."""
    base = preset("routing-noise")
    settings = [base.replace(setting=f"digits-{n}", digits=n) for n in DIGITS]
    settings += [base.replace(setting=f"tokens-{k}", digits_per_token=k) for k in (1, 2)]
    return [config for setting in settings for config in of_arms(setting, ARMS, FIVE_SEEDS)]
