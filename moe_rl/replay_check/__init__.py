"""The independent checker of record and replay: of a model, and of a recorded trace.

check.py           the ten laws, and their results on one model
claims.py          how a law states what it claims, and how that is judged
check_routing.py, check_training.py   the laws themselves
check_subject.py   the model under test, and what laws compare
experts_watch.py   what the experts really got, seen without the taps under test
check_trace.py     what is wrong with a recorded trace
compare.py         how two recorded routings differ: `moe-rl churn`
families.py        every family of transformers that has a router: a small model, its gate weights
"""

from moe_rl.replay_check.check import check_replay
from moe_rl.replay_check.check_trace import check_trace
from moe_rl.replay_check.claims import LawResult

__all__ = ["LawResult", "check_replay", "check_trace"]
