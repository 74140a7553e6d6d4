"""How much routing and log-probs move on one checkpoint between ways to read the same tokens.

audit = audit_model(config, prompts, sample=Sample(...))     # moe-rl audit
ways.py        other numerics, experts backends and batch shapes, an engine, a recorded trace
difference.py  what two readings differ in, and how much of it replay removes
verdict.py     what that means for training, in words
"""

from moe_rl.audit.audit import Audit, Sample, audit_model

__all__ = ["Audit", "Sample", "audit_model"]
