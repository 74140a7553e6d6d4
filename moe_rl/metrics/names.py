"""What other trainers call the metrics that are the same quantities, so that dashboards line up.

A name is here only where formula, pair of policies and mean over tokens agree; a metric that comes
near (verl's chi-squared, its effective sample size of the rollout's weights) is not. Clip shares
agree for losses that clip as PPO's surrogate does: ours count every token whose gradient a loss
removes, so also those of dual clip's bound, of CISPO and of masks. slime's means are over tokens
with its `--calculate-per-token-loss`. Importable without torch.
"""

from collections.abc import Mapping
from typing import Literal

Dialect = Literal["verl", "trl", "prime", "slime", "nemo"]

NAMES: dict[str, dict[Dialect, str]] = {
    "reward": {"verl": "critic/rewards/mean", "trl": "reward"},
    "zero_std_groups": {"trl": "frac_reward_zero_std"},
    "response_length": {"verl": "response_length/mean", "trl": "completions/mean_length"},
    "truncated": {"verl": "response_length/clip_ratio", "trl": "completions/clipped_ratio"},
    "entropy": {"verl": "actor/entropy", "trl": "entropy"},
    "grad_norm": {"verl": "actor/grad_norm", "trl": "grad_norm"},
    "learning_rate": {"verl": "actor/lr", "trl": "learning_rate"},
    "loss": {"verl": "actor/pg_loss", "trl": "loss"},
    "kl": {"verl": "actor/ppo_kl", "slime": "ppo_kl"},
    "clip_ratio/low": {"trl": "clip_ratio/low_mean"},
    "clip_ratio/high": {"trl": "clip_ratio/high_mean"},
    "clip_ratio/region": {
        "verl": "actor/pg_clipfrac",
        "trl": "clip_ratio/region_mean",
        "slime": "pg_clipfrac",
    },
    "mismatch/kl_k1": {"verl": "rollout_corr/kl", "slime": "mis_kl"},
    "mismatch/kl_k3": {
        "verl": "rollout_corr/k3_kl",
        "prime": "mismatch_kl/all/mean",
        "slime": "mis_k3_kl",
        "nemo": "gen_kl_error",
    },
    "routing/confidence": {"prime": "routing_confidence"},
    "routing/max_vio": {"prime": "max_vio"},
}
"""Our name -> dialect -> theirs."""


def ours_of(dialect: Dialect) -> dict[str, str]:
    """Their name of each metric that they log -> ours."""
    return {names[dialect]: ours for ours, names in NAMES.items() if dialect in names}


def rename(metrics: Mapping[str, float], dialect: Dialect) -> dict[str, float]:
    """The metrics under a dialect's names; those that it has no name for keep ours.

    Trackers have `update/` before metrics of updates, which a translated name loses.
    """
    return {
        NAMES.get(name.removeprefix("update/"), {}).get(dialect, name): value
        for name, value in metrics.items()
    }
