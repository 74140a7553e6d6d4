"""The independent checker of record and replay: of a model, and of a recorded trace.

check.py           the ten laws, and their verdicts on one model
check_routing.py, check_training.py   the laws themselves
check_subject.py   the model under test; what a broken law says
experts_watch.py   what the experts really got, seen without the taps under test
check_trace.py     what is wrong with a recorded trace
families.py        every family of transformers that has a router, as a small model
gate_formula.py    each family's gate weights, written down apart from its code
"""

from moe_rl.replay_check.check import Finding, check_replay
from moe_rl.replay_check.check_trace import check_trace

__all__ = ["Finding", "check_replay", "check_trace"]
