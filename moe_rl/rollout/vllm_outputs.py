"""vLLM's outputs as a rollout, every field checked on the way.

| field of RequestOutput           | what it must be                                              |
|----------------------------------|--------------------------------------------------------------|
| `prompt_token_ids`               | the prompt that was sent                                     |
| `prompt_routed_experts`          | a row a prompt token, in the release that has it (0.21)      |
| `outputs`                        | G completions, one of each `index`                           |

| field of CompletionOutput        | what it must be                                              |
|----------------------------------|--------------------------------------------------------------|
| `token_ids`                      | 1 to max_tokens ids, behind the end of sequence none         |
| `finish_reason`                  | stop, or length: truncated                                   |
| `logprobs`                       | a dict a token, in it the sampled id's log-prob, finite      |
| `routed_experts`                 | a layout of moe_rl/traces/foreign.py: a row a token that was |
|                                  | fed, of K different ids below E                              |

Errors name the request, the completion and the field.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_rl.batch import RolloutBatch
from moe_rl.policy.policy import Policy
from moe_rl.routing.routed_experts import NO_RECORD
from moe_rl.traces.foreign import from_vllm, record_for_model


@dataclass(frozen=True, kw_only=True)
class _Response:
    tokens: list[int]
    logprobs: list[float]
    truncated: bool
    routes: Tensor
    """int16 [prompt + response, L, K]."""


def read_outputs(
    outputs: Sequence[Any],
    *,
    policy: Policy,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    group_size: int,
    max_tokens: int,
) -> RolloutBatch:
    """The `RequestOutput`s of P prompts, G completions each, as a rollout.

    Args:
        outputs: in the order of the prompts.
        policy: whose copy vLLM sampled with.
        prompt_ids, prompt_mask: [P, Sp], left padded, as they were sent.
        group_size: G.
        max_tokens: longest response.

    Raises:
        ValueError: a field is missing or malformed.
        FloatingPointError: a log-prob is not a number.
    """
    if len(outputs) != len(prompt_ids):
        raise ValueError(f"vLLM: {len(outputs)} outputs for {len(prompt_ids)} requests")
    responses = []
    for i, (output, ids, kept) in enumerate(zip(outputs, prompt_ids, prompt_mask, strict=True)):
        where = f"vLLM, request {i}"
        _check_prompt(output, ids[kept].tolist(), where)
        for completion in _completions(output, group_size, where):
            named = f"{where}, completion {completion.index}"
            responses.append(_response(output, completion, policy, max_tokens, named))
    return _batch(responses, policy, prompt_ids, prompt_mask)


def _check_prompt(output: Any, sent: list[int], where: str) -> None:
    received = output.prompt_token_ids
    if received is None or list(received) != sent:
        raise ValueError(
            f"{where}: prompt_token_ids {received!r:.100} is not the prompt that was sent; "
            "outputs must come in the order of the requests"
        )


def _completions(output: Any, group_size: int, where: str) -> list[Any]:
    found = sorted(output.outputs, key=lambda completion: completion.index)
    if [completion.index for completion in found] != list(range(group_size)):
        raise ValueError(
            f"{where}: outputs has completions {[completion.index for completion in found]}, "
            f"asked for were {group_size} (SamplingParams.n)"
        )
    return found


def _response(
    output: Any, completion: Any, policy: Policy, max_tokens: int, where: str
) -> _Response:
    tokens = [int(token) for token in completion.token_ids]
    truncated = _truncated(completion.finish_reason, tokens, policy.eos_id, max_tokens, where)
    vocabulary = policy.model.get_input_embeddings().num_embeddings
    if not all(0 <= token < vocabulary for token in tokens):
        raise ValueError(
            f"{where}: token_ids from {min(tokens)} to {max(tokens)}, the model has "
            f"{vocabulary} words"
        )
    return _Response(
        tokens=tokens,
        logprobs=_logprobs(completion.logprobs, tokens, where),
        truncated=truncated,
        routes=_routes(output, completion, len(output.prompt_token_ids), policy, where),
    )


def _truncated(reason: Any, tokens: list[int], eos_id: int, limit: int, where: str) -> bool:
    if not 1 <= len(tokens) <= limit:
        raise ValueError(
            f"{where}: token_ids has {len(tokens)} tokens, asked for were 1 to {limit}"
        )
    if eos_id in tokens[:-1]:
        raise ValueError(f"{where}: token_ids goes on behind the end of sequence ({eos_id})")
    ended = tokens[-1] == eos_id
    if reason == "stop" and ended:
        return False
    if reason == "length" and not ended and len(tokens) == limit:
        return True
    hint = ""
    if reason == "length" and not ended:
        hint = "; the model's context is too short for prompt and response (max_model_len)"
    raise ValueError(
        f"{where}: finish_reason={reason!r} with {len(tokens)} of {limit} tokens, the last "
        f"{'the' if ended else 'not the'} end of sequence{hint}"
    )


def _logprobs(rows: Any, tokens: list[int], where: str) -> list[float]:
    if rows is None:
        raise ValueError(f"{where}: logprobs is missing; sample with SamplingParams(logprobs=0)")
    if len(rows) != len(tokens):
        raise ValueError(f"{where}: logprobs has {len(rows)} rows for {len(tokens)} tokens")
    found = []
    for t, (row, token) in enumerate(zip(rows, tokens, strict=True)):
        if token not in row:
            raise ValueError(
                f"{where}: logprobs[{t}] has ids {sorted(row)[:8]}, not the sampled one ({token})"
            )
        value = float(row[token].logprob)
        if not math.isfinite(value):
            raise FloatingPointError(f"{where}: logprobs[{t}] of token {token} is {value}")
        found.append(value)
    return found


def _routes(output: Any, completion: Any, prompt_length: int, policy: Policy, where: str) -> Tensor:
    """int16 [S, L, K] of a prompt and its response; the last token was never fed: -1."""
    generated = completion.routed_experts
    prompt = getattr(output, "prompt_routed_experts", None)
    if generated is None:
        raise ValueError(
            f"{where}: routed_experts is missing; build the engine with "
            "enable_return_routed_experts=True. Where that was done, vLLM 0.21 loses the record of "
            "a request that it preempts: leave it more memory"
        )
    length = prompt_length + len(completion.token_ids)
    try:
        rows = _joined(generated, prompt, prompt_length, length)
        record = record_for_model([rows], policy.model, num_tokens=length)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    lost = (record[0, prompt_length - 1 : -1] < 0).flatten(1).any(dim=1).nonzero()
    if len(lost):
        raise ValueError(
            f"{where}: routed_experts has no record where response token {int(lost[0])} is "
            "predicted; a replay would choose live there"
        )
    return record[0]


def _joined(generated: Any, prompt: Any, prompt_length: int, length: int) -> np.ndarray:
    """Rows of the tokens that were fed, S - 1 of them, whichever way the release gives them."""
    generated = np.asarray(generated)
    if prompt is not None:
        prompt = np.asarray(prompt)
        if len(prompt) != prompt_length:
            raise ValueError(
                f"prompt_routed_experts: {len(prompt)} rows for {prompt_length} prompt tokens."
            )
    rows = from_vllm(generated, prompt)
    # A row for the last token, where there is one, is no route: that token was never fed.
    return rows[: length - 1] if len(rows) == length else rows


def _batch(
    responses: list[_Response], policy: Policy, prompt_ids: Tensor, prompt_mask: Tensor
) -> RolloutBatch:
    """Responses of uneven length, right padded, behind prompts that are left padded."""
    count, width = len(responses), prompt_ids.shape[1]
    longest = max(len(response.tokens) for response in responses)
    ids = torch.full((count, longest), policy.pad_id)
    mask = torch.zeros(count, longest, dtype=torch.bool)
    logprobs = torch.zeros(count, longest)
    layers, top_k = responses[0].routes.shape[1:]
    shape = (count, width + longest, layers, top_k)
    routes = torch.full(shape, NO_RECORD, dtype=torch.int16)
    for i, response in enumerate(responses):
        length = len(response.tokens)
        ids[i, :length] = torch.tensor(response.tokens)
        mask[i, :length] = True
        logprobs[i, :length] = torch.tensor(response.logprobs)
        end = width + length
        routes[i, end - len(response.routes) : end] = response.routes
    device = policy.device
    return RolloutBatch(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        response_ids=ids.to(device),
        response_mask=mask.to(device),
        rollout_logprobs=logprobs.to(device),
        routed_experts=routes.to(device),
        router_logits=None,
        truncated=torch.tensor([response.truncated for response in responses]).to(device),
    )
