"""Prompts and their responses in one forward pass, each prompt read once.

A pass over prompts into a cache and a second over the responses costs every layer twice: at a few
hundred thousand parameters a call's fixed cost is what counts, and 72 prompt rows fill no product.
Here the rows `[P * Sp + P * G * T]` go through the model as one sequence of batch 1; only attention
knows which row belongs where.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe_rl.fused_layers.heads import Part
from moe_rl.fused_layers.parts import PositionEmbeddings, causal


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
        cos, sin = positions
        half = cos.shape[-1] // 2
        turns = torch.complex(cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous())
        first, rest = turns[: self.prompt_rows], turns[self.prompt_rows :]
        own, prompt_mask = (
            causal(self.prompt_length, self.prompt_length, self.prompt_length, hidden),
            None,
        )
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
        self._shared = (cos, parts)
        return parts


def read_in_one_pass(
    model: Any, prompt_ids: Tensor, response_ids: Tensor, prompt_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Hidden states of prompts and responses from one forward pass, with gradients.

    The model sees one sequence of batch 1: first the rows of all prompts, then those of all
    responses. Routers therefore see `[P * Sp + B * T]` tokens in that order, and a record or a
    replay of their choices has those positions.

    Args:
        model: a causal LM whose attention `use_fused_layers` has swapped.
        prompt_ids: int64 `[P, Sp]`, left padded.
        response_ids: int64 `[B, T]`, B = P * G, the responses to one prompt being neighbours.
        prompt_mask: bool `[P, Sp]`, False on padding; None where there is none.

    Returns:
        Last hidden states `[P, Sp, H]` and `[B, T, H]`.

    Raises:
        ValueError: a batch that is no multiple of the prompts, or attention that is not fused.
    """
    prompts, prompt_length = prompt_ids.shape
    batch, length = response_ids.shape
    if batch % prompts:
        raise ValueError(
            f"response_ids has {batch} rows for {prompts} prompts: pass the same number of "
            "responses to every prompt"
        )
    rows = OnePass(
        prompts=prompts,
        prompt_length=prompt_length,
        group=batch // prompts,
        length=length,
        prompt_mask=prompt_mask,
    )
    ids = torch.cat([prompt_ids.reshape(-1), response_ids.reshape(-1)]).unsqueeze(0)
    hidden = model.base_model(
        input_ids=ids,
        position_ids=rows.position_ids(),
        # Four axes: transformers takes it for a finished mask and builds none. `OnePass` masks.
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device),
        use_cache=False,
        one_pass=rows,
    ).last_hidden_state[0]
    split = rows.prompt_rows
    return hidden[:split].view(prompts, prompt_length, -1), hidden[split:].view(batch, length, -1)
