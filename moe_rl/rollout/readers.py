"""How a rollout reads its prompts, and then each token that it has sampled.

    with read_with_cache(policy, prompt_ids, prompt_mask, group, options, noise) as reading:
        ...  # reading.hidden, then reading.next(tokens) for each token
    routes = reading.recorded("routed_experts")

Shapes: P prompts, B = P * G responses, Sp prompt positions, T response tokens, H hidden.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_rl.policy.forward import ForwardOptions, routing_contexts
from moe_rl.policy.pass_noise import PassNoise
from moe_rl.policy.policy import Policy


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A rollout's prompts, read; its responses are read token by token."""

    hidden: Tensor
    """[B, H] where the first token of each response is predicted."""
    next: Callable[[Tensor], Tensor]
    """Hidden states [B, H] after one more token of each response, int64 [B]."""
    recorded: Callable[[str], tuple[Tensor, Tensor | None]]
    """A property of `RecordedRouting` of the prompts [P, Sp, ...] and of the response tokens that
    were read [B, T - 1, ...], None where no token was."""


@contextlib.contextmanager
def read_with_cache(
    policy: Policy,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    group: int,
    options: ForwardOptions,
    noise: PassNoise | None,
) -> Iterator[Reading]:
    """Prompts [P, Sp], once per group into a key-value cache; then each token alone."""
    draws = noise.for_prompts() if noise else None
    with routing_contexts(policy.model, options, noise=draws) as seen_prompts:
        hidden, cache = policy.read_prompts(prompt_ids, prompt_mask)
    cache.batch_repeat_interleave(group)
    read = 0

    def step(tokens: Tensor) -> Tensor:
        nonlocal read
        read += 1
        return policy.continue_responses(tokens[:, None], cache, prompt_mask, group)[:, -1]

    def recorded(name: str) -> tuple[Tensor, Tensor | None]:
        return getattr(seen_prompts, name), getattr(seen, name) if read else None

    draws = noise.for_responses() if noise else None
    with routing_contexts(policy.model, options, noise=draws) as seen:
        first = hidden[:, -1].repeat_interleave(group, dim=0)
        yield Reading(hidden=first, next=step, recorded=recorded)


@contextlib.contextmanager
def read_whole(
    policy: Policy,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    group: int,
    options: ForwardOptions,
    noise: PassNoise | None,
) -> Iterator[Reading]:
    """All tokens so far, anew for each token: for models whose cache serves no group."""
    width = prompt_ids.shape[1]
    ids = prompt_ids.repeat_interleave(group, dim=0)
    mask = prompt_mask.repeat_interleave(group, dim=0)
    records: list[Any] = []

    def step(tokens: Tensor) -> Tensor:
        nonlocal ids, mask
        ids = torch.cat([ids, tokens[:, None]], dim=1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=True)
        # Fresh draws begin with the values that earlier tokens had.
        draws = noise.for_sequences(width) if noise else None
        with routing_contexts(policy.model, options, noise=draws) as seen:
            hidden = policy.read_whole(ids, mask)[:, -1]
        records.append(seen)
        return hidden

    def recorded(name: str) -> tuple[Tensor, Tensor | None]:
        # Where each token was sampled from: a later pass may round a near tie otherwise.
        last = [getattr(seen, name)[:, -1:] for seen in records]
        return getattr(seen_prompts, name), torch.cat(last, dim=1) if last else None

    draws = noise.for_prompts() if noise else None
    with routing_contexts(policy.model, options, noise=draws) as seen_prompts:
        hidden = policy.read_whole(prompt_ids, prompt_mask)
    first = hidden[:, -1].repeat_interleave(group, dim=0)
    yield Reading(hidden=first, next=step, recorded=recorded)
