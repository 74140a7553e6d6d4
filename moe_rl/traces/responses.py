"""Traces: routes in the JSON responses of vLLM and SGLang servers.

A response is an object, several are a list; each completion has its own `routed_experts`.
"""

import base64
import io
from collections.abc import Iterator
from typing import Any

import numpy as np

from moe_rl.traces.foreign import KEY, PROMPT_KEY, from_sglang, from_vllm


def read_responses(
    content: Any, num_layers: int | None, top_k: int | None
) -> tuple[list[np.ndarray], str]:
    """Routes `[S_i or S_i-1, L, K]` of every completion, and the system that wrote the response.

    Raises:
        ValueError: no completion has routes, or they cannot be decoded.
    """
    rows, source = [], "vLLM"
    for routes, prompt in _completions(content):
        row, source = _array(routes, num_layers, top_k)
        if prompt is not None:
            row, source = from_vllm(row, _array(prompt, num_layers, top_k)[0]), "vLLM 0.21"
        rows.append(row)
    if not rows:
        raise ValueError(
            f"no response in it has {KEY!r}; turn the record of routed experts on in the server "
            "(vLLM: --enable-return-routed-experts)"
        )
    return rows, source


def _completions(content: Any) -> Iterator[tuple[Any, Any]]:
    """(routes, routes of the prompt or None) of each completion."""
    if isinstance(content, list):
        for response in content:
            yield from _completions(response)
    elif isinstance(content, dict):
        # vLLM's OpenAI server has choices, its LLM.generate outputs, SGLang meta_info.
        choices = content.get("choices") or content.get("outputs") or []
        places: list[Any] = [content, content.get("meta_info"), *choices]
        # SGLang may repeat in sglext what meta_info says: read it only where the rest is silent.
        if not any(_has_routes(place) for place in places):
            places = [content.get("sglext")]
        for place in filter(_has_routes, places):
            yield place[KEY], place.get(PROMPT_KEY, content.get(PROMPT_KEY))


def _has_routes(place: Any) -> bool:
    return isinstance(place, dict) and place.get(KEY) is not None


def _array(value: Any, num_layers: int | None, top_k: int | None) -> tuple[np.ndarray, str]:
    """Ids, and who sends them so: nested lists, base64 of an npy file, or SGLang's flat bytes."""
    if not isinstance(value, str):
        return np.array(value), "vLLM"
    raw = base64.b64decode(value, validate=True)
    if raw.startswith(np.lib.format.MAGIC_PREFIX):
        return np.load(io.BytesIO(raw)), "vLLM"
    if num_layers is None or top_k is None:
        raise ValueError(
            f"{KEY}: flat bytes (SGLang) do not say their shape; pass num_layers (all decoder "
            "layers of the model) and top_k (--num-layers and --top-k on the command line)"
        )
    return from_sglang(value, num_layers=num_layers, top_k=top_k), "SGLang"
