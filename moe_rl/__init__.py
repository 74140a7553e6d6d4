"""moe_rl: reinforcement learning on Mixture-of-Experts language models, with the instruments on.

It imports nothing, so that `import moe_rl` is fast. Import the package that you need:
`moe_rl.routing`, `moe_rl.losses`, `moe_rl.tasks`, `moe_rl.rollout`, `moe_rl.training.run`, and the
three sibling folders `moe_rl.kernels`, `moe_rl.analysis` and `moe_rl.experiments`.
"""

__version__ = "0.1.0"
