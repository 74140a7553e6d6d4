"""Integrations: routes that a rollout engine hands over, laid out as the trainer pads its batch.

A sequence of an engine is prompt and response without padding; a trainer's batch has prompts padded
on the left and responses on the right. Layouts of engines: moe_rl/traces/foreign.py.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe_rl.routing.routed_experts import NO_RECORD
from moe_rl.traces.foreign import decode_base64, from_vllm, npy_bytes, record_for_model

FIELD = "routed_experts"
PROMPT_FIELD = "prompt_routed_experts"


def vllm_routes(outputs: Sequence[Any]) -> list[np.ndarray]:
    """The routes of every completion of vLLM's `LLM.generate`, prompt-major: `[S_i - 1, L, K]`.

    The engine must have been started with `enable_return_routed_experts=True`.

    Args:
        outputs: vLLM's `RequestOutput`s.

    Raises:
        ValueError: a completion without routes.
    """
    rows: list[np.ndarray] = []
    for output in outputs:
        prompt = getattr(output, PROMPT_FIELD, None)
        for completion in output.outputs:
            generated = as_array(getattr(completion, FIELD, None), len(rows))
            whole = None if prompt is None else as_array(prompt, len(rows))
            rows.append(from_vllm(generated, whole))
    return rows


def join_prompts(routes: Sequence[Any], prompts: Sequence[Any] | None) -> list[np.ndarray]:
    """Rows of whole sequences, where an engine may hand over prompts and responses apart.

    Raises:
        ValueError: a sequence without routes, or the two differ in number.
    """
    if prompts is None:
        return [as_array(value, index) for index, value in enumerate(routes)]
    if len(prompts) != len(routes):
        raise ValueError(
            f"{PROMPT_FIELD}: {len(prompts)} prompts for {len(routes)} completions. Repeat the "
            "routes of a prompt for each of its completions."
        )
    pairs = enumerate(zip(routes, prompts, strict=True))
    return [from_vllm(as_array(row, i), as_array(prompt, i)) for i, (row, prompt) in pairs]


def as_array(value: Any, index: int) -> np.ndarray:
    """Ids of sequence `index` from an array, a tensor, nested lists, or base64 of an npy file.

    Raises:
        ValueError: None, lists of uneven length, or a text that is something else.
    """
    if value is None:
        raise ValueError(
            f"{FIELD}: sequence {index} has none. Turn the engine's record on (vLLM: "
            "enable_return_routed_experts=True)."
        )
    if isinstance(value, Tensor):
        return value.detach().cpu().numpy()
    if isinstance(value, str):
        array = npy_bytes(decode_base64(value))
        if array is None:
            raise ValueError(
                f"{FIELD}: the text of sequence {index} is no npy file. Flat bytes (SGLang) do not "
                "say their shape: pass moe_rl.traces.foreign.from_sglang(...) of them."
            )
        return array
    try:
        return np.asarray(value)
    except ValueError as error:
        raise ValueError(
            f"{FIELD}: sequence {index}: lists of uneven length make no [S, L, K]."
        ) from error


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
        model: the model that will replay them.

    Returns:
        The record, -1 at padding and at tokens that the engine has no routes of.

    Raises:
        ValueError: rows and sequences differ in number or length, or the ids do not fit the model.
    """
    _require_lengths(rows, lengths)
    record = record_for_model(rows, model)
    batch = torch.full((len(rows), length, *record.shape[2:]), NO_RECORD, dtype=record.dtype)
    for index, (row, (prompt, _)) in enumerate(zip(rows, lengths, strict=True)):
        start = prompt_length - prompt
        batch[index, start : start + len(row)] = record[index, : len(row)]
    return batch


def _require_lengths(rows: Sequence[np.ndarray], lengths: Sequence[tuple[int, int]]) -> None:
    if len(rows) != len(lengths):
        raise ValueError(
            f"{FIELD}: routes of {len(rows)} sequences for {len(lengths)} completions. Return one "
            "entry a completion, in their order."
        )
    for index, (row, (prompt, response)) in enumerate(zip(rows, lengths, strict=True)):
        tokens = prompt + response
        if row.ndim == 3 and row.shape[0] not in (tokens, tokens - 1):
            raise ValueError(
                f"{FIELD}: sequence {index} has {row.shape[0]} positions, but {prompt} prompt and "
                f"{response} response tokens. Return one row a token of both, or one less because "
                "the last token is never fed."
            )
