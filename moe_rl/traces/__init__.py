"""Traces: routes that other systems recorded, read into the record `[B, S, L, K]`.

files.py      `read_trace`: which reader a file gets; npz, npy and safetensors
responses.py  JSON responses of vLLM and SGLang
megatron.py   Megatron-LM's router trace (JSONL)
foreign.py    the arrays inside these, and fitting a record to a model
"""

from moe_rl.traces.files import Trace, read_trace, write_trace
from moe_rl.traces.foreign import fit_to_model

__all__ = ["Trace", "fit_to_model", "read_trace", "write_trace"]
