"""How much routing and log-probs move on one checkpoint between ways to read the same tokens.

audit = audit_model(config, prompts, sample=Sample(...))     # moe-rl audit
ways.py        other numerics, experts backends and batch shapes, an engine, a recorded trace
difference.py  what two readings differ in, and how much of it replay removes
trace.py       a recorded trace as a rollout that the model can read
verdict.py     what that means for training, in words
result.py      all of it, as a table and as audit.json
"""

from moe_rl.audit.audit import audit_model
from moe_rl.audit.result import Audit, Sample

__all__ = ["Audit", "Sample", "audit_model"]
