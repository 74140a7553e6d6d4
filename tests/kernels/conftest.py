"""Where the Triton kernels run in these tests: on a GPU, or in Triton's interpreter.

Triton looks at TRITON_INTERPRET when a kernel is defined, which is when `moe_rl.kernels` first
needs one: long after this file, which pytest loads before it collects the tests beside it. One
process for all tests, and no second run to forget: plain `make test` covers the kernels anywhere.
Where there is a CUDA device the same tests compile them instead.

These tests import what they share as `problems`.
"""

import os
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

sys.path.insert(0, str(Path(__file__).parent))
