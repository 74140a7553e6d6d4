"""Integrations: routing replay and the instruments inside trainers that others wrote.

verl.py           our losses, and our metrics on verl's own, as its policy losses
verl_engine.py    the routing of verl's FSDP engine, old policy against new
verl_trainer.py   verl's trainer, which reads each step's batch
slime.py          two hooks of slime, miles and vime
prime_rl.py       a custom loss of prime-rl
loss_metrics.py   the metrics of an update that need no routes
trl.py            RoutingReplayMixin, for TRL's GRPOTrainer
trl_metrics.py    its metrics, over micro-batches and processes
trl_support.py    what it refuses, and the versions that it was tested with
trl_warning.py    a callback that warns of a coming collapse
engine_routes.py  routes that a rollout engine returns, laid out as a padded batch

Nothing else in moe_rl imports this package. trl.py needs TRL, the extra `trl`.
"""

NEEDS_MORE = {
    # With one of the two, the correction of trainer against engine would be 1, and the loss GRPO.
    **dict.fromkeys(
        ("tis", "mis", "geo_rs", "icepop"),
        "log-probs of a trainer pass of its own and the engine's",
    ),
    "rspo": "router logits",
    "ppo": "values",
}
"""Algorithms that verl and prime-rl are not offered, and what they do not hand to a loss."""
