"""Traces: routes that other systems recorded, read into the record `[B, S, L, K]`.

files.py      `read_trace`: which reader a file gets; npz, npy and safetensors
responses.py  responses of vLLM and SGLang: JSON, JSONL, parquet
encodings.py  one array of routes in a response, from nested lists to base64
megatron.py   Megatron-LM's router trace (JSONL)
foreign.py    rows of sequences made into a record, and fitting that to a model
"""

from moe_rl.traces.files import Trace, read_trace, write_trace
from moe_rl.traces.foreign import fit_to_model

__all__ = ["Trace", "fit_to_model", "read_trace", "write_trace"]
