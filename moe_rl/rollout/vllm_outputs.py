"""vLLM's outputs as a rollout.

| field of RequestOutput    | what it must be                                                      |
|---------------------------|----------------------------------------------------------------------|
| `prompt_token_ids`        | the prompt that was sent                                             |
| `outputs`                 | G completions, one of each `index`                                   |

| field of CompletionOutput | what it must be                                                      |
|---------------------------|----------------------------------------------------------------------|
| `token_ids`               | 1 to max_tokens ids                                                  |
| `finish_reason`           | stop at the end of sequence; length at max_tokens: truncated         |
| `logprobs`                | one dict per token, with the finite log-prob of the sampled id       |
| `routed_experts`          | `[S - 1, L, K]` or one row more: a row per token that was fed        |

Errors name the request, the completion and the field.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from moe_rl.batch import RolloutBatch, predicting
from moe_rl.policy.policy import Policy
from moe_rl.replay_check.check_trace import require_information
from moe_rl.routing import find_routers
from moe_rl.routing.routed_experts import NO_RECORD
from moe_rl.traces.foreign import record_for_model


class _Response(NamedTuple):
    tokens: list[int]
    logprobs: list[float]
    truncated: bool
    routes: np.ndarray
    """Integers [prompt + response - 1, L, K]: the last token was never fed."""
    where: str
    """The request and the completion, for errors."""


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

    `prompt_ids` and `prompt_mask` [P, Sp] are left padded, as they were sent.

    Raises:
        ValueError: a field is missing or malformed.
        FloatingPointError: a log-prob is NaN or inf.
    """
    responses = []
    for i, (output, ids, kept) in enumerate(zip(outputs, prompt_ids, prompt_mask, strict=True)):
        completions = sorted(output.outputs, key=lambda completion: completion.index)
        found = [completion.index for completion in completions]
        if output.prompt_token_ids != ids[kept].tolist() or found != [*range(group_size)]:
            raise ValueError(
                f"vLLM, request {i}: prompt_token_ids={output.prompt_token_ids!r:.100} with "
                f"completions {found}: expected the prompt that was sent and {group_size} "
                "completions; outputs must come in the order of the requests"
            )
        for completion in completions:
            where = f"vLLM, request {i}, completion {completion.index}"
            tokens = [*completion.token_ids]
            truncated = completion.finish_reason == "length" and len(tokens) == max_tokens
            ended = bool(tokens) and tokens[-1] in policy.end_ids
            stopped = completion.finish_reason == "stop" and ended
            if not (truncated or stopped):
                raise ValueError(
                    f"{where}: finish_reason={completion.finish_reason!r} after {len(tokens)} of "
                    f"{max_tokens} tokens: expected the end of sequence, or the last token; vLLM's "
                    "max_model_len must hold prompt and response"
                )
            logprobs = _read_logprobs(completion.logprobs, tokens, where)
            length = len(output.prompt_token_ids) + len(tokens)
            routes = _read_routes(completion.routed_experts, length, where)
            responses.append(_Response(tokens, logprobs, truncated, routes, where))
    batch = _batch_responses(responses, policy, prompt_ids, prompt_mask)
    _check_routes(batch, policy)
    return batch


def _read_logprobs(rows: Any, tokens: list[int], where: str) -> list[float]:
    if rows is None:
        raise ValueError(f"{where}: logprobs is missing; sample with SamplingParams(logprobs=0)")
    found = [float(row[token].logprob) for row, token in zip(rows, tokens, strict=True)]
    if not all(map(math.isfinite, found)):
        raise FloatingPointError(f"{where}: logprobs has NaN or inf")
    return found


def _read_routes(rows: Any, length: int, where: str) -> np.ndarray:
    """The rows of a sequence of `length` tokens but for the last, which was never fed."""
    if rows is None:
        raise ValueError(
            f"{where}: routed_experts is missing; build the engine with "
            "enable_return_routed_experts=True"
        )
    rows = np.asarray(rows)
    # Some releases give the last token a row too: no route.
    if rows.ndim != 3 or len(rows) not in (length - 1, length):
        raise ValueError(
            f"{where}: routed_experts: shape {list(rows.shape)} for {length} tokens; expected "
            "[tokens - 1, layers, experts per token]"
        )
    return rows[: length - 1]


def _record_routes(responses: list[_Response], policy: Policy) -> Tensor:
    """int16 [B, longest, L, K], right padded by -1.

    All at once, because finding the routers of a model takes longer than reading a response.
    """
    try:
        return record_for_model([response.routes for response in responses], policy.model)
    except ValueError:
        for response in responses:  # which of them is malformed?
            try:
                record_for_model([response.routes], policy.model)
            except ValueError as error:
                raise ValueError(f"{response.where}: {error}") from error
        raise


def _check_routes(batch: RolloutBatch, policy: Policy) -> None:
    group, prompt_length = batch.group_size, batch.prompt_ids.shape[1]
    prompts = batch.prompt_ids.repeat_interleave(group, dim=0)
    try:
        require_information(
            batch.routed_experts,
            num_experts=find_routers(policy.model)[0].num_experts,
            response=predicting(batch.response_mask, prompt_length),
            tokens=torch.cat([prompts, batch.response_ids], dim=1),
        )
    except ValueError as error:
        raise ValueError(
            f"vLLM, where sequence b is completion b % {group} of request b // {group}: {error}"
        ) from error


def _batch_responses(
    responses: list[_Response], policy: Policy, prompt_ids: Tensor, prompt_mask: Tensor
) -> RolloutBatch:
    """Responses of different lengths, right padded, after prompts that are left padded."""
    device, width = policy.device, prompt_ids.shape[1]
    ids = pad_sequence(
        [torch.tensor(r.tokens) for r in responses], batch_first=True, padding_value=policy.pad_id
    )
    logprobs = pad_sequence([torch.tensor(r.logprobs) for r in responses], batch_first=True)
    lengths = torch.tensor([len(r.tokens) for r in responses])
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    record = _record_routes(responses, policy)
    shape = len(responses), width + ids.shape[1], *record.shape[2:]
    routes = torch.full(shape, NO_RECORD, dtype=torch.int16)
    for row, found, response in zip(routes, record, responses, strict=True):
        fed, end = len(response.routes), width + len(response.tokens) - 1
        row[end - fed : end] = found[:fed]
    return RolloutBatch(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        response_ids=ids.to(device),
        response_mask=mask.to(device),
        rollout_logprobs=logprobs.to(device),
        routed_experts=routes.to(device),
        router_logits=None,
        truncated=torch.tensor([response.truncated for response in responses], device=device),
    )
