"""Traces: routes in the responses of vLLM and SGLang servers, and of what stands in front of them.

A response is an object, several are a list or the lines of a file, bare or in the envelope of
vLLM's batch runner (`vllm run-batch`). A completion has `routed_experts`, in one of the forms of
`encodings.py`, in the choice itself, its message or its meta_info. Where the response says how many
tokens it has, rows and log-probs are held against that.
"""

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moe_rl.routing.routed_experts import NO_RECORD
from moe_rl.traces.encodings import decode_routes
from moe_rl.traces.foreign import from_vllm

Json = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Responses:
    """The completions of a file, in its order."""

    rows: list[np.ndarray]
    """Ids `[S_i or S_i - 1, L, K]` of each; one row of -1 where a completion has no record."""
    recorded: list[bool]
    """Which completions have routes."""
    prompts: list[int | None]
    """Prompt tokens of each, None where the response does not say."""
    lengths: list[int | None]
    """Prompt and response tokens of each, likewise."""
    tokens: list[list[int] | None]
    """Ids of prompt and response of each, None where the response does not say."""
    logprobs: list[list[float] | None]
    """Log-probs of the sampled tokens of each, nats, likewise; NaN for a null."""
    source: str
    notes: tuple[str, ...] = ()
    """What a reader of the trace must know."""


@dataclass(frozen=True, kw_only=True)
class _Completion:
    """One completion as the file has it."""

    place: Json = field(default_factory=dict)
    """The object that holds its routes; empty: none does."""
    response: Json = field(default_factory=dict)
    """The response that it is a part of."""
    choice: Json = field(default_factory=dict)
    alone: bool = True
    """Whether the response has no other, so that its usage is this one's."""
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class _Reader:
    """What is needed to read the completions of a file."""

    key: str
    num_layers: int | None
    top_k: int | None

    def find(self, content: Any) -> Iterator[_Completion]:
        """The completions in a response, or a list of them."""
        if isinstance(content, list):
            for response in content:
                yield from self.find(response)
        elif isinstance(content, Mapping) and "custom_id" in content:
            answer, error = _object(content.get("response")), content.get("error")
            if error or answer.get("status_code", 200) != 200:
                yield _Completion(error=str(error or answer.get("body"))[:200])
            else:
                yield from self.find(answer.get("body"))
        elif isinstance(content, Mapping):
            # vLLM's servers have choices, its LLM.generate outputs, NeMo Gym's items output.
            names = ("choices", "outputs", "output")
            lists = [content[name] for name in names if isinstance(content.get(name), list)]
            choices = lists[0] if lists else []
            found = [self._completion(content, choice, len(choices) == 1) for choice in choices]
            whole = self._completion(content, content, len(choices) <= 1)
            if whole.place and not any(one.place for one in found):
                yield whole
            else:
                yield from found

    def _completion(self, response: Json, choice: Any, alone: bool) -> _Completion:
        """Where the routes of a choice are. SGLang may say in sglext what meta_info says."""
        if not isinstance(choice, Mapping):
            return _Completion(response=response, alone=alone)
        inside = (choice.get(name) for name in ("message", "meta_info", "sglext", "sgl_ext"))
        places = (place for place in (choice, *inside) if isinstance(place, Mapping))
        found: Json = next((place for place in places if place.get(self.key) is not None), {})
        return _Completion(place=found, response=response, choice=choice, alone=alone)

    def routes(self, completion: _Completion) -> tuple[np.ndarray, str]:
        """Ids of a completion from its first position on, and who wrote them."""
        place, key = completion.place, self.key
        decode = functools.partial(decode_routes, num_layers=self.num_layers, top_k=self.top_k)
        declared = place.get(f"{key}_dtype"), place.get(f"{key}_start_len")
        ids, source = decode(place[key], dtype=declared[0], start=declared[1])
        prompt = place.get(f"prompt_{key}", completion.response.get(f"prompt_{key}"))
        if prompt is None:
            return ids, source
        return from_vllm(ids, decode(prompt)[0]), "vLLM 0.21"


def read_responses(
    contents: Iterable[Any], *, num_layers: int | None, top_k: int | None, key: str
) -> Responses:
    """Routes of every completion of some responses.

    Args:
        contents: responses, or lists of them.
        num_layers, top_k: of the model; SGLang's flat bytes need them.
        key: the field that holds the routes, `routed_experts` in all systems known.

    Raises:
        ValueError: no completion has routes, or they cannot be decoded, or they are not as many as
            the response says that it has tokens.
    """
    reader = _Reader(key=key, num_layers=num_layers, top_k=top_k)
    contents = [*contents]
    if not contents:
        raise ValueError("no response in it; it is empty")
    found = [one for content in contents for one in reader.find(content)]
    rows: dict[int, np.ndarray] = {}
    logprobs: dict[int, list[float] | None] = {}
    source = "vLLM"
    for number, one in enumerate(found):
        if one.place:
            try:
                rows[number], source = reader.routes(one)
                _check_count(rows[number], one)
                logprobs[number] = _logprobs(one)
            except (TypeError, ValueError) as error:
                raise ValueError(f"completion {number}: {error}") from error
    if not rows:
        raise ValueError(f"no response in it has {key!r}; {_why_none(found, key)}")
    shape = next(iter(rows.values())).shape[1:]
    none = np.full((1, *shape), NO_RECORD)
    missing = len(found) - len(rows)
    errors = [one.error for one in found if one.error]
    note = f"{missing} of {len(found)} completions have no {key!r}: rows of -1"
    note += f" ({len(errors)} failed, the first with {errors[0]})" if errors else ""
    counts = [_counts(one) for one in found]
    return Responses(
        rows=[rows.get(number, none) for number in range(len(found))],
        recorded=[number in rows for number in range(len(found))],
        prompts=[prompt for prompt, _ in counts],
        lengths=[None if None in both else sum(both) for both in counts],  # type: ignore[arg-type]
        tokens=[_tokens(one) for one in found],
        logprobs=[logprobs.get(number) for number in range(len(found))],
        source=source,
        notes=(note,) if missing else (),
    )


def _why_none(found: list[_Completion], key: str) -> str:
    errors = [one.error for one in found if one.error]
    if errors:
        return f"{len(errors)} of {len(found)} requests failed, the first with: {errors[0]}"
    if any(f"prompt_{key}" in one.response for one in found):
        return f"only prompt_{key}, the routes of the prompt: the record of responses was lost"
    return (
        "turn the record of routed experts on in the server (vLLM: --enable-return-routed-experts; "
        "SGLang: that and return_routed_experts in the request), or name another field (--array)"
    )


def _length(one: _Completion, *names: str) -> int | None:
    """Length of the first list of tokens of one of these names."""
    for place in (one.place, one.choice, one.response):
        for name in names:
            if isinstance(place.get(name), list):
                return len(place[name])
    return None


def _counts(one: _Completion) -> tuple[int | None, int | None]:
    """Prompt and response tokens of a completion, None where the response does not say."""
    prompt = _length(one, "prompt_token_ids", "input_ids")
    response = _length(one, "token_ids", "generation_token_ids", "output_ids")
    usage = one.response.get("usage") if one.alone else None
    for meta in map(_object, (one.place, one.choice.get("meta_info"), usage)):
        said = meta.get("prompt_tokens"), meta.get("completion_tokens")
        prompt = said[0] if prompt is None and isinstance(said[0], int) else prompt
        response = said[1] if response is None and isinstance(said[1], int) else response
    return prompt, response


def _object(value: Any) -> Json:
    return value if isinstance(value, Mapping) else {}


def _tokens(one: _Completion) -> list[int] | None:
    """Ids of prompt and response, where the response has both."""
    places = (one.place, one.choice, one.response)
    prompt = next((p["prompt_token_ids"] for p in places if p.get("prompt_token_ids")), None)
    names = "token_ids", "generation_token_ids"
    response = next((p[name] for p in places for name in names if p.get(name)), None)
    if not isinstance(prompt, list) or not isinstance(response, list):
        return None
    whole = [*prompt, *response]
    return whole if all(isinstance(token, int) for token in whole) else None


def _logprobs(one: _Completion) -> list[float] | None:
    """Log-probs of the sampled tokens, where the response has them.

    Raises:
        ValueError: they are not as many as the response has tokens.
    """
    meta, openai = _object(one.choice.get("meta_info")), _object(one.choice.get("logprobs"))
    sglang = meta.get("output_token_logprobs") or []  # a log-prob, an id and a text each
    candidates = (
        openai.get("token_logprobs"),
        [_object(token).get("logprob") for token in openai.get("content") or []],
        [token[0] for token in sglang],
        one.place.get("generation_log_probs"),  # NeMo Gym
    )
    values = next((found for found in candidates if found), None)
    if values is None:
        return None
    tokens = _counts(one)[1]
    if tokens is not None and len(values) != tokens:
        raise ValueError(f"log-probs of {len(values)} tokens, and the response has {tokens}")
    return [math.nan if value is None else float(value) for value in values]


def _check_count(rows: np.ndarray, one: _Completion) -> None:
    """Raise ValueError unless a completion has one row a token, or one less."""
    prompt, response = _counts(one)
    if prompt is None or response is None or len(rows) in (total := prompt + response, total - 1):
        return
    if len(rows) == 2 * (total - 1):
        hint = "as many as if each router was recorded twice in a forward"
    elif len(rows) < total:
        hint = (
            "rows were lost on the way, or begin at a later position than the file says "
            "(routed_experts_start_len)"
        )
    else:
        hint = "the record is of other tokens, or its start position was applied twice"
    raise ValueError(
        f"routed_experts: rows up to position {len(rows)}, and the response says that it has "
        f"{prompt} prompt and {response} response tokens; {hint}"
    )
