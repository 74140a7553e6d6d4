"""What befalls a run under way."""

from faults.datasets import rows
from faults.table import Fault

EMPTY = b'{"prompt": "a", "answer": ""}\n{"prompt": "b", "answer": ""}\n'
TRAIN = ("train", "--preset", "tiny", "--steps", "2", "--out", "run")
READ = (*TRAIN, "--task", "dataset", "--dataset", "rows.jsonl", "--slip", "0")
FAST = (*TRAIN, "--warmup-steps", "0", "--learning-rate", "1e30")

RUNS = {
    "every response is empty, every reward 1": Fault(READ, rows(EMPTY), torch=True, writes=True),
    "a cold start that diverges": Fault(
        (*TRAIN, "--sft-learning-rate", "1e30"), torch=True, writes=True
    ),
    "a run that diverges": Fault(FAST, torch=True, writes=True),
}
