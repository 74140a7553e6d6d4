"""The k largest of a few scores, without branches that the data decides.

On router scores, `torch.topk` on a CPU takes four times as long: it branches on every number, and
the branches cannot be predicted. Searching k times for a maximum reads a row as vectors instead.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary


def top_k(scores: Tensor, k: int) -> Any:
    """`torch.topk(scores, k)`: (values, indices) `[..., k]`, descending, values with a gradient.

    Of equal scores the one with the lower id comes first. A router that calls it can be recorded
    and replayed as one that calls `torch.topk`.
    """
    if has_torch_function_unary(scores):
        return handle_torch_function(top_k, (scores,), scores, k)
    if scores.device.type == "cpu" and scores.dtype in (torch.float32, torch.float64):
        found = _search(scores.detach(), k)
        if found is not None:
            indices = torch.from_numpy(found).view(*scores.shape[:-1], k)
            return torch.return_types.topk((scores.gather(-1, indices), indices))
    return torch.topk(scores, k, dim=-1)


def largest(scores: Tensor, k: int) -> Tensor:
    """The k largest values along the last axis, descending: `[..., E]` -> `[..., k]`.

    Without a gradient. A NaN counts as the largest.
    """
    scores = scores.detach()
    if scores.device.type == "cpu" and scores.dtype in (torch.float32, torch.float64):
        # Sorting whole rows without branches takes a quarter of searching k times.
        return torch.from_numpy(np.sort(scores.numpy(), axis=-1)[..., : -k - 1 : -1].copy())
    return torch.topk(scores, k, dim=-1).values


def _search(scores: Tensor, k: int) -> np.ndarray | None:
    """int64 [N, k]; None where a row has fewer than k scores above -inf, which marks the taken."""
    rest = scores.reshape(-1, scores.shape[-1]).numpy().copy()
    rows = np.arange(rest.shape[0])
    indices = np.empty((rest.shape[0], k), np.int64)
    for i in range(k):
        best = rest.argmax(-1)
        if np.isneginf(rest[rows, best]).any():
            return None
        indices[:, i] = best
        rest[rows, best] = -np.inf
    return indices
