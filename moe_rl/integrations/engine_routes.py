"""Integrations: routes that a rollout engine returns, laid out as the trainer pads its batch.

A sequence of an engine is prompt and response without padding; a trainer's batch has prompts padded
on the left and responses on the right. Layouts of engines: moe_rl/traces/foreign.py.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe_rl.replay_check.check_trace import require_information
from moe_rl.routing import find_routers
from moe_rl.routing.routed_experts import NO_RECORD
from moe_rl.traces.encodings import decode_routes
from moe_rl.traces.foreign import from_vllm, record_for_model

FIELD = "routed_experts"
PROMPT_FIELD = "prompt_routed_experts"


def vllm_routes(outputs: Sequence[Any]) -> list[np.ndarray]:
    """The routes of every completion of vLLM's `LLM.generate`, prompt-major: `[S_i - 1, L, K]`.

    The engine must have been started with `enable_return_routed_experts=True`.

    Raises:
        ValueError: a completion without routes.
    """
    pairs = [(output, completion) for output in outputs for completion in output.outputs]
    routes = [getattr(completion, FIELD, None) for _, completion in pairs]
    prompts = [getattr(output, PROMPT_FIELD, None) for output, _ in pairs]
    return join_prompts(routes, prompts)


def join_prompts(routes: Sequence[Any], prompts: Sequence[Any] | None) -> list[np.ndarray]:
    """Rows of whole sequences, where an engine may return prompts and responses apart.

    `prompts` has the routes of the prompt of each completion, None where `routes` hold them.

    Raises:
        ValueError: a sequence without routes, or the two differ in number.
    """
    apart = [None] * len(routes) if prompts is None else prompts
    return [
        from_vllm(as_array(row, i), None if prompt is None else as_array(prompt, i))
        for i, (row, prompt) in enumerate(zip(routes, apart, strict=True))
    ]


def as_array(value: Any, index: int) -> np.ndarray:
    """Ids of sequence `index` in any form of moe_rl/traces/encodings.py that says its shape.

    Flat bytes (SGLang) carry no shape: decode them with its `decode_routes(value, num_layers=...,
    top_k=...)` first.

    Raises:
        ValueError: None, or a value that cannot be decoded.
    """
    if value is None:
        raise ValueError(
            f"{FIELD}: sequence {index} has none; turn the engine's record on (vLLM: "
            "enable_return_routed_experts=True)"
        )
    return decode_routes(value)[0]


def lay_out(
    rows: Sequence[np.ndarray],
    lengths: Sequence[tuple[int, int]],
    *,
    prompt_length: int,
    length: int,
    model: nn.Module,
) -> Tensor:
    """The record of a padded batch, int16 `[B, S, L, K]`, from the routes of its sequences.

    Args:
        rows: of each sequence ids `[S_i or S_i - 1, L or all decoder layers, K]`, no padding.
        lengths: of each sequence (prompt tokens, response tokens); S_i is their sum.
        prompt_length: positions of the padded prompts.
        length: S, positions of the padded batch.

    Returns:
        The record, -1 at padding and at tokens that the engine has no routes of.

    Raises:
        ValueError: rows and sequences differ in number or length, or the ids do not fit the model.
    """
    given, tokens = [len(row) for row in rows], [sum(both) for both in lengths]
    # The last token of a sequence is never fed to the model, so engines have no routes of it.
    if len(given) != len(tokens) or any(
        s not in (n, n - 1) for s, n in zip(given, tokens, strict=True)
    ):
        raise ValueError(
            f"{FIELD}: {len(given)} entries of {given} positions for {len(tokens)} completions of "
            f"{tokens} prompt and response tokens; return one entry per completion, in their "
            "order, and in it one row per token, or one less"
        )
    record = record_for_model(rows, model)
    batch = torch.full((len(rows), length, *record.shape[2:]), NO_RECORD, dtype=record.dtype)
    for index, (row, (prompt, _)) in enumerate(zip(rows, lengths, strict=True)):
        start = prompt_length - prompt
        batch[index, start : start + len(row)] = record[index, : len(row)]
    return batch


def check_record(
    record: Tensor,
    tokens: Tensor,
    counted: Sequence[Sequence[int]],
    *,
    prompt_length: int,
    model: nn.Module,
) -> None:
    """Refuse a record that tells nothing, or lacks rows where a token of the loss is predicted.

    Args:
        record: int16 `[B, S, L, K]`, of `lay_out`.
        tokens: int64 `[B, S]`, the padded batch.
        counted: of each response 1 for every token that the loss counts, 0 for those of tools.
        prompt_length: positions of the padded prompts.

    Raises:
        ValueError: names the check of `moe-rl check-replay` that fails.
    """
    response = torch.zeros(record.shape[:2], dtype=torch.bool)
    for row, mask in zip(response, counted, strict=True):
        row[prompt_length - 1 : prompt_length - 1 + len(mask)] = torch.tensor(mask) > 0
    require_information(
        record,
        num_experts=find_routers(model)[0].num_experts,
        response=response,
        tokens=tokens.cpu(),
    )
