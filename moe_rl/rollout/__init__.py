"""Rollout engines: sample responses, record log-probs and expert choices."""
