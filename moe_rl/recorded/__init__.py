"""Batches that another trainer, or ours, has recorded: read, measured, and told in words.

inspection = inspect_batch(read_batch(path))            # moe-rl inspect
batch.py       what a batch holds, whatever its source
readers.py     files of ours, verl, prime-rl, NeMo-RL, vLLM
inspection.py  the numbers
findings.py    what stands out
trl_log.py     metrics of TRL's trainer_state.json
"""

from moe_rl.recorded.batch import (
    RecordedBatch,
    response_rows,
    versions_between,
    write_batch,
)
from moe_rl.recorded.inspection import Inspection, inspect_batch
from moe_rl.recorded.readers import read_batch

__all__ = [
    "Inspection",
    "RecordedBatch",
    "inspect_batch",
    "read_batch",
    "response_rows",
    "versions_between",
    "write_batch",
]
