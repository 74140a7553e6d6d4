"""The data that travels: a rollout as the engine records it, and what the updates learn from.

Shapes: P prompts, G samples each, B = P * G sequences, Sp prompt and T response positions, L MoE
layers, K experts per token, E experts.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True, kw_only=True)
class RolloutBatch:
    """P prompts and B = P * G responses; the responses to one prompt are neighbours."""

    prompt_ids: Tensor
    """int64 [P, Sp], left padded."""
    prompt_mask: Tensor
    """bool [P, Sp], False on padding."""
    response_ids: Tensor
    """int64 [B, T], right padded; the end-of-sequence token is part of the response."""
    response_mask: Tensor
    """bool [B, T], False after the end of sequence."""
    rollout_logprobs: Tensor
    """float32 [B, T], the engine's log-probs of the sampled tokens."""
    routed_experts: Tensor
    """int16 [B, Sp + T, L, K], the engine's expert choices. The last sampled token is never fed
    back, so its row is -1 (no record)."""
    router_logits: Tensor | None
    """float32 [B, T, L, E], the engine's router logits where each response token is predicted."""
    gate_weights: Tensor | None = None
    """float32 [B, Sp + T, L, K], the weights that the engine's chosen experts counted with, NaN in
    the row of the last token; None unless TRR replays them."""
    truncated: Tensor
    """bool [B], no end of sequence within the response budget."""

    @property
    def group_size(self) -> int:
        """Responses per prompt G."""
        return self.response_ids.shape[0] // self.prompt_ids.shape[0]

    def select_prompts(self, prompts: slice) -> "RolloutBatch":
        """The sub-batch of whole groups of a contiguous range of prompts."""
        group = self.group_size
        sequences = slice(prompts.start * group, prompts.stop * group)
        per_prompt = {"prompt_ids", "prompt_mask"}
        parts: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            rows = prompts if field.name in per_prompt else sequences
            parts[field.name] = None if value is None else value[rows]
        return RolloutBatch(**parts)

    def padded(self, prompt_length: int, response_length: int, *, pad_id: int) -> "RolloutBatch":
        """The same rollout with prompts and responses padded to at least their longest.

        Args:
            prompt_length, response_length: at least Sp and T.
            pad_id: token that fills up.
        """
        left = prompt_length - self.prompt_ids.shape[1]
        right = response_length - self.response_ids.shape[1]
        if left == right == 0:
            return self
        logits, weights = self.router_logits, self.gate_weights
        return RolloutBatch(
            prompt_ids=pad(self.prompt_ids, (left, 0), value=pad_id),
            prompt_mask=pad(self.prompt_mask, (left, 0), value=False),
            response_ids=pad(self.response_ids, (0, right), value=pad_id),
            response_mask=pad(self.response_mask, (0, right), value=False),
            rollout_logprobs=pad(self.rollout_logprobs, (0, right)),
            routed_experts=pad(self.routed_experts, (0, 0, 0, 0, left, right), value=-1),
            router_logits=None if logits is None else pad(logits, (0, 0, 0, 0, 0, right)),
            gate_weights=None
            if weights is None
            else pad(weights, (0, 0, 0, 0, left, right), value=torch.nan),
            truncated=self.truncated,
        )


@dataclass(frozen=True, kw_only=True)
class Experience:
    """A rollout with its advantages, and the old policy's view of it."""

    batch: RolloutBatch
    advantages: Tensor
    """float32 [B], or [B, T] where a value head gives each token its own."""
    old_logprobs: Tensor
    """float32 [B, T], under the routing that the updates replay, if they replay any."""
    old_routes: Tensor
    """int16 [B, Sp + T, L, K], the old policy's live choices: what churn is measured against."""
    old_router_logits: Tensor | None = None
    """float32 [B, T, L, E], the old policy's router logits."""
    replay: Tensor
    """int16 [B, Sp + T, L, K], the record that updates replay, if they replay any."""
    old_values: Tensor | None = None
    """float32 [B, T], what a value head said before the updates."""
    returns: Tensor | None = None
    """float32 [B, T], what it should have said."""

    def select_prompts(self, prompts: slice) -> "Experience":
        """The part of it that belongs to whole groups of a contiguous range of prompts."""
        group = self.batch.group_size
        rows = slice(prompts.start * group, prompts.stop * group)
        parts: dict[str, Any] = {"batch": self.batch.select_prompts(prompts)}
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            parts[field.name] = None if value is None else value[rows]
        return Experience(**parts)


def response_positions(sequence_values: Tensor, prompt_length: int) -> Tensor:
    """Values at the positions that predict response tokens: [B, Sp + T, ...] -> [B, T, ...].

    Response token t is predicted where token Sp + t - 1 is read.
    """
    return sequence_values[:, prompt_length - 1 : -1]


def predicting(response_mask: Tensor, prompt_length: int) -> Tensor:
    """Where a sequence predicts the response tokens of a mask: bool [B, T] -> [B, Sp + T]."""
    return pad(response_mask, (prompt_length - 1, 1), value=False)


def predictions(prompt_values: Tensor, response_values: Tensor | None, group_size: int) -> Tensor:
    """Values where each response token is predicted: [P, Sp, ...] and [B, T-1, ...] -> [B, T, ...].

    The first is the one at the prompt's last token; None stands for responses of one token.
    """
    first = prompt_values[:, -1:].repeat_interleave(group_size, dim=0)
    return first if response_values is None else torch.cat([first, response_values], dim=1)


def full_record(
    prompt_routes: Tensor, response_routes: Tensor | None, group_size: int, *, fill: float = -1
) -> Tensor:
    """Join the routes of shared prompts [P, Sp, L, K] and responses [B, T-1, L, K] to one record.

    None stands for responses of one token. Returns [B, Sp + T, L, K], of ids or gate weights, whose
    last position is `fill`: that token is never read.
    """
    prompts = prompt_routes.repeat_interleave(group_size, dim=0)
    responses = [] if response_routes is None else [response_routes]
    return torch.cat([prompts, *responses, torch.full_like(prompts[:, :1], fill)], dim=1)
