"""Integrations: routing replay and the instruments inside trainers that others wrote.

trl.py            RoutingReplayMixin, for TRL's GRPOTrainer
trl_metrics.py    its metrics, over micro-batches and processes
trl_support.py    what it refuses, and the versions that it was tested with
engine_routes.py  routes that a rollout engine returns, laid out as a padded batch

Nothing else in moe_rl imports this package. trl.py needs TRL, the extra `trl`.
"""
