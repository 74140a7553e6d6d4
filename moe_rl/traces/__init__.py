"""Traces: routes that other systems recorded, read into the record `[B, S, L, K]`.

files.py     trace files: npz, npy, safetensors, JSON, Megatron-LM's JSONL
arrays.py    arrays of npy and npz files, read without pickle or evaluation
limits.py    what a trace may grow to in memory
foreign.py   the layouts of vLLM and SGLang, and fitting a record to a model
"""

from moe_rl.traces.files import Trace, read_trace, write_trace
from moe_rl.traces.foreign import fit_to_model

__all__ = ["Trace", "fit_to_model", "read_trace", "write_trace"]
