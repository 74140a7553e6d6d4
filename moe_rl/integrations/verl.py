"""verl: the instruments on its policy losses, and our losses as its own. Loaded by verl itself.

verl imports this module in every process, through the entry point `verl.plugins` of the installed
package; nothing of verl is changed. It adds policy losses:

    actor_rollout_ref.actor.policy_loss.loss_mode=measured/vanilla   verl's own loss, and metrics
    actor_rollout_ref.actor.policy_loss.loss_mode=moe_rl/gspo        our loss, and metrics

for each of verl's modes and of our algorithms that need no more than verl hands to a loss. Metrics
are logged as `actor/moe_rl/NAME`, each the mean over micro-batches. Tested with verl 0.9.
"""

from typing import Any

from torch import Tensor

from moe_rl.integrations import NEEDS_MORE

# What our names stand for is imported where it is used: every process of verl imports this module.
MEASURED, OURS = "measured/", "moe_rl/"
PREFIX = "actor/moe_rl/"


def register() -> list[str]:
    """Add the policy losses to verl's registry; returns their names."""
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, register_policy_loss

    from moe_rl.losses import ALGORITHMS

    own = [name for name in POLICY_LOSS_REGISTRY if not name.startswith((MEASURED, OURS))]
    added = {f"{MEASURED}{name}": POLICY_LOSS_REGISTRY[name] for name in own}
    added |= {f"{OURS}{name}": _as_verl(name) for name in ALGORITHMS if name not in NEEDS_MORE}
    for name, loss in added.items():
        register_policy_loss(name)(measured(loss))
    return list(added)


def measured(policy_loss: Any) -> Any:
    """A policy loss of verl that returns our metrics beside its own."""

    def loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        *rest: Any,
        **named: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        from moe_rl.integrations.loss_metrics import loss_metrics

        def run(logprobs: Tensor) -> tuple[Tensor, dict[str, Any]]:
            return policy_loss(old_log_prob, logprobs, advantages, response_mask, *rest, **named)

        value, metrics = run(log_prob)
        found = loss_metrics(
            lambda leaf: run(leaf)[0], log_prob, old_log_prob, advantages, response_mask
        )
        return value, metrics | {f"{PREFIX}{name}": number for name, number in found.items()}

    return loss


def _as_verl(name: str) -> Any:
    """One of our losses with verl's signature and verl's means over tokens."""
    from moe_rl.losses import ALGORITHMS, make_inputs, resolve_options

    algorithm = ALGORITHMS[name]

    def loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        from verl.trainer.ppo.core_algos import agg_loss

        inputs = make_inputs(log_prob, old_log_prob, advantages, response_mask.bool())
        low, high = (
            config.clip_ratio if value is None else value  # as verl's losses read them
            for value in (config.clip_ratio_low, config.clip_ratio_high)
        )
        bound = config.clip_ratio_c if name == "dual_clip" else None
        given = {"clip_low": low, "clip_high": high, "bound": bound}
        options = resolve_options(
            name,
            algorithm,
            {key: value for key, value in given.items() if key in algorithm.options},
            or_else="set them as actor_rollout_ref.actor.clip_ratio_low and clip_ratio_high, or "
            f"take verl's own loss at any range, loss_mode=measured/{name}",
        )
        tokens = algorithm.loss(inputs, **options)
        if rollout_is_weights is not None:
            tokens = tokens * rollout_is_weights
        value = agg_loss(
            loss_mat=tokens,
            loss_mask=response_mask,
            loss_agg_mode=loss_agg_mode,
            **config.global_batch_info,
        )
        return value, {}

    return loss


register()
