"""Integrations: routes that a rollout engine returns, laid out as the trainer pads its batch.

A sequence of an engine is prompt and response without padding; a trainer's batch has prompts padded
on the left and responses on the right. Layouts of engines: moe_rl/traces/foreign.py.
"""

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe_rl.routing.routed_experts import NO_RECORD
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
    """Ids of sequence `index` from an array, a tensor, nested lists, or base64 of an npy file.

    Flat bytes (SGLang) do not say their shape: pass moe_rl.traces.foreign.from_sglang(...) of them.

    Raises:
        ValueError: None, or numpy's own of uneven lists or of a text that is no npy file.
    """
    if value is None:
        raise ValueError(
            f"{FIELD}: sequence {index} has none; turn the engine's record on (vLLM: "
            "enable_return_routed_experts=True)"
        )
    if isinstance(value, Tensor):
        return value.detach().cpu().numpy()
    if isinstance(value, str):
        array: np.ndarray = np.load(io.BytesIO(base64.b64decode(value)))
        return array
    return np.asarray(value)


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
