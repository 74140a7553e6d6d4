"""Prompts and their responses in one forward pass, each prompt read once.

A pass over prompts into a cache and a second over the responses costs every layer twice: at a few
hundred thousand parameters a call's fixed cost is what counts, and 72 prompt rows fill no product.
Here the rows `[P * Sp + P * G * T]` go through the model as one sequence of batch 1; only attention
knows which row belongs where.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_rl.cpu.heads import Part
from moe_rl.cpu.parts import PositionEmbeddings, causal, turns_of


@dataclass(kw_only=True)
class OnePass:
    """Which rows are which: P prompts of Sp positions, then G responses to each, of T positions."""

    prompts: int
    prompt_length: int
    group: int
    length: int
    prompt_mask: Tensor | None = None
    """bool `[P, Sp]`, False on left padding; None: no padding."""
    _shared: tuple[Tensor, tuple[Part, ...]] | None = field(default=None, repr=False)

    @property
    def prompt_rows(self) -> int:
        """Rows before the first response."""
        return self.prompts * self.prompt_length

    def position_ids(self) -> Tensor:
        """int64 `[1, N]`: padding does not count."""
        prompt = torch.arange(self.prompt_length).expand(self.prompts, -1)
        used = torch.full((self.prompts, 1), self.prompt_length)
        if self.prompt_mask is not None:
            prompt = (self.prompt_mask.long().cumsum(1) - 1).clamp_(min=0)
            used = self.prompt_mask.sum(1, keepdim=True)
        response = used.to(prompt.device) + torch.arange(self.length, device=prompt.device)
        response = response.repeat_interleave(self.group, dim=0)
        return torch.cat([prompt.reshape(-1), response.view(-1)]).unsqueeze(0)

    def parts(self, positions: PositionEmbeddings, hidden: Tensor) -> tuple[Part, ...]:
        """The two parts; computed by the first layer of a forward, shared by the others."""
        if self._shared is not None and self._shared[0] is positions[0]:
            return self._shared[1]
        turns = turns_of(positions, ())
        half = turns.shape[-1]
        first, rest = turns[: self.prompt_rows], turns[self.prompt_rows :]
        own = causal(self.prompt_length, self.prompt_length, self.prompt_length, hidden)
        prompt_mask: Tensor | None = None
        if self.prompt_mask is None:
            first, rest = first[: self.prompt_length], rest[: self.length]
        else:
            first = first.view(self.prompts, 1, 1, 1, self.prompt_length, half)
            rest = rest.view(self.prompts, 1, self.group, 1, self.length, half)
            prompt_mask = self.prompt_mask.to(hidden.dtype)[:, None, None, None, None, :]
            own = prompt_mask if own is None else prompt_mask * own
        parts = (
            Part(
                start=0,
                prompts=self.prompts,
                group=1,
                length=self.prompt_length,
                turns=first,
                own_mask=own,
            ),
            Part(
                start=self.prompt_rows,
                prompts=self.prompts,
                group=self.group,
                length=self.length,
                turns=rest,
                own_mask=causal(self.length, self.length, self.length, hidden),
                prompt_mask=prompt_mask,
            ),
        )
        self._shared = (positions[0], parts)
        return parts
