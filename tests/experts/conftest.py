"""One thread, as in tests/routing: small products lose to the threads that share them."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
