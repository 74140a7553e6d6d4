"""Triton's interpreter for the kernels of Megablocks where there is no GPU.

Triton looks at TRITON_INTERPRET when a kernel is defined, which is when megablocks is first used,
after this file has been read.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
