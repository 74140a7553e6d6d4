"""Stands in for a rotary embedding's `forward`: rows of a table instead of cosines of every row.

A pass over hundreds of short sequences asks for the angles of a few positions a thousand times.
The table is made by the class's own forward, so its rows are stock values to the last bit.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_rl.cpu.rms_norm import EXACT_DTYPES

TABLE = "_moe_rl_table"
"""Attribute of the module that holds its table."""

_FIRST_LENGTH = 256
_LONGEST = 1 << 16  # beyond it a table costs more memory than it saves time


class _Table(NamedTuple):
    made_of: Tensor
    version: int
    cos: Tensor
    sin: Tensor


def rotary_forward(self: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin `[B, T, D]` at `position_ids` `[B, T]`, in the dtype of x."""
    longest = int(position_ids.max()) + 1 if position_ids.numel() else 0
    if x.dtype not in EXACT_DTYPES or not 0 < longest <= _LONGEST or int(position_ids.min()) < 0:
        return type(self).forward(self, x, position_ids)
    table = _table(self, x, longest)
    rows, shape = position_ids.reshape(-1), (*position_ids.shape, -1)
    return table.cos.index_select(0, rows).view(shape), table.sin.index_select(0, rows).view(shape)


def _table(rotary: Any, x: Tensor, longest: int) -> _Table:
    """The module's table, rebuilt when it is too short or the frequencies have changed."""
    frequencies: Tensor = rotary.inv_freq
    table: _Table | None = vars(rotary).get(TABLE)
    current = (
        table is not None
        and table.made_of is frequencies
        and table.version == frequencies._version
        and table.cos.dtype == x.dtype
        and table.cos.shape[0] >= longest
    )
    if table is None or not current:
        length = max(_FIRST_LENGTH, 1 << (longest - 1).bit_length())
        cos, sin = type(rotary).forward(rotary, x, torch.arange(length).unsqueeze(0))
        table = _Table(frequencies, frequencies._version, cos[0], sin[0])
        setattr(rotary, TABLE, table)
    return table
