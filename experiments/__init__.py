"""moe_rl.experiments: the studies."""
