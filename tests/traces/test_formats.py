"""Formats of recorded routes: what is written is what is read, and faults are found in each."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trace_faults as t

from moe_rl.replay_check import check_trace
from moe_rl.replay_check.check_trace import require_information
from moe_rl.traces import Trace, read_trace


def read(path: Path) -> Trace:
    return read_trace(path, batch_size=t.B, **t.READ)


def found(trace: Trace) -> set[str]:
    given = {"response": trace.response, "tokens": trace.tokens}
    results = check_trace(trace.routed_experts, num_experts=t.E, **given)
    return {result.check for result in results if result.passed is False}


@pytest.mark.parametrize("name", t.FORMATS)
def test_a_record_survives_every_format(name: str, tmp_path: Path) -> None:
    trace = read(t.written(tmp_path, name, t.routes()))
    assert np.array_equal(trace.routed_experts, t.routes())
    assert trace.routed_experts.dtype == torch.int16
    assert found(trace) == set() and trace.notes == ()


@pytest.mark.parametrize("name", t.FORMATS)
def test_every_fault_is_found_in_every_format(name: str, tmp_path: Path) -> None:
    records = {fault: t.spoiled(fault) for fault in t.FAULTS}
    if name in t.UNSIGNED:  # what has no sign has no -1 either
        records = {fault: ids for fault, ids in records.items() if ids.min() >= 0}
    results = {fault: found(read(t.written(tmp_path, name, ids))) for fault, ids in records.items()}
    assert [fault for fault, checks in results.items() if t.FAULTS[fault][0] not in checks] == []


@pytest.mark.parametrize("fault", t.FAULTS)
def test_every_fault_is_refused_where_the_response_and_its_tokens_are_known(fault: str) -> None:
    response = torch.zeros(t.B, t.S, dtype=torch.bool)
    response[:, t.RESPONSE] = True
    known = {"num_experts": t.E, "response": response, "tokens": torch.from_numpy(t.tokens())}
    require_information(torch.from_numpy(t.routes()), **known)
    with pytest.raises(ValueError, match=r"^routed_experts: .*\(check '.*' of moe-rl check-repl"):
        require_information(torch.from_numpy(t.spoiled(fault)), **known)


def test_rows_of_the_prompt_alone_may_be_missing() -> None:
    """A prefix from the cache, and tokens of tools between those of the model."""
    ids = torch.from_numpy(t.routes())
    response = torch.zeros(t.B, t.S, dtype=torch.bool)
    response[:, t.RESPONSE] = True
    response[:, 12:15] = False
    ids[~response] = -1
    tokens = torch.from_numpy(t.tokens())
    require_information(ids, num_experts=t.E, response=response, tokens=tokens)


# Responses that say what they hold.


SAYING: dict[str, Callable[[np.ndarray, int, int], Any]] = {
    "sglang": lambda ids, p, r: t.sglang(ids, prompt_tokens=p, completion_tokens=r),
    "vllm": lambda ids, p, r: {
        "prompt_token_ids": [5] * p,
        "choices": [{"token_ids": [6] * r, "routed_experts": ids.tolist()}],
    },
    "usage": lambda ids, p, r: (
        t.choices([ids.tolist()]) | {"usage": {"prompt_tokens": p, "completion_tokens": r}}
    ),
    "prime-rl": lambda ids, p, r: {
        "prompt_token_ids": [5] * p,
        "choices": [{"token_ids": [6] * r, "routed_experts": t.payload(ids)}],
    },
    "gym": lambda ids, p, r: {
        "output": [
            {
                "prompt_token_ids": [5] * p,
                "generation_token_ids": [6] * r,
                "routed_experts": t.nemo(ids),
            }
        ]
    },
}


@pytest.mark.parametrize("name", SAYING)
def test_rows_are_as_many_as_the_tokens_that_the_response_says_it_has(
    name: str, tmp_path: Path
) -> None:
    path, ids = tmp_path / "r.json", t.routes(1)[0, :-1]
    path.write_text(json.dumps(SAYING[name](ids, t.PROMPT, t.S - t.PROMPT)))
    trace = read(path)
    assert trace.response is not None
    assert trace.response[0].nonzero().flatten().tolist() == [*range(t.PROMPT - 1, t.S - 1)]
    for rows, words in (
        (ids[:-1], "rows were lost on the way"),
        (np.repeat(ids, 2, axis=0), "each router was recorded twice"),
        (np.concatenate([ids, ids[:3]]), "the record is of other tokens"),
    ):
        path.write_text(json.dumps(SAYING[name](rows, t.PROMPT, t.S - t.PROMPT)))
        with pytest.raises(ValueError, match=f"says that it has 8 prompt and 16 .*{words}"):
            read(path)


def test_a_failed_request_takes_nothing_from_the_others(tmp_path: Path) -> None:
    ids = t.routes(1)[0, :-1]
    good = SAYING["vllm"](ids, t.PROMPT, t.S - t.PROMPT)
    good = {"custom_id": "a", "response": {"status_code": 200, "body": good}}
    failed = {"custom_id": "b", "response": {"status_code": 500, "body": "out of memory"}}
    path = tmp_path / "r.jsonl"
    path.write_bytes(t.lines([failed, good]))
    trace = read(path)
    assert trace.response is not None and trace.tokens is not None
    assert trace.response.sum(1).tolist() == [0, t.S - t.PROMPT]
    assert (trace.tokens[0] == -1).all() and (trace.tokens[1] >= 0).all()
    assert trace.notes == (
        "1 of 2 completions have no 'routed_experts': rows of -1 (1 failed, the first with "
        "out of memory)",
    )
    assert found(trace) == set()


WITH_LOGPROBS: dict[str, Callable[[list[Any]], Any]] = {
    "chat": lambda values: {"logprobs": {"content": [{"logprob": v} for v in values]}},
    "completions": lambda values: {"logprobs": {"token_logprobs": values}},
    "sglang": lambda values: {"meta_info": {"output_token_logprobs": [[v, 6, ""] for v in values]}},
    "gym": lambda values: {"generation_log_probs": values},
}


@pytest.mark.parametrize("name", WITH_LOGPROBS)
def test_log_probs_stand_where_their_tokens_are_predicted(name: str, tmp_path: Path) -> None:
    path, ids, tokens = tmp_path / "r.json", t.routes(1)[0, :-1], t.S - t.PROMPT
    said = [-0.25 * k for k in range(tokens - 1)]

    def write(values: list[Any]) -> None:
        choice = {"token_ids": [6] * tokens, "routed_experts": ids.tolist()}
        choice |= WITH_LOGPROBS[name](values)
        path.write_text(json.dumps({"prompt_token_ids": [5] * t.PROMPT, "choices": [choice]}))

    write([*said, None])
    logprobs = read(path).logprobs
    assert logprobs is not None and logprobs.shape == (1, t.S)
    known = logprobs[0].isfinite()
    assert known.nonzero().flatten().tolist() == [*range(t.PROMPT - 1, t.S - 2)]
    assert logprobs[0][known].tolist() == said
    write(said)
    with pytest.raises(ValueError, match="log-probs of 15 tokens, and the response has 16"):
        read(path)
    write([])
    assert read(path).logprobs is None


@pytest.mark.parametrize("start", [0, 1, 7])
@pytest.mark.parametrize("name", ["sglang", "object"])
def test_rows_begin_at_the_position_that_the_file_says(
    name: str, start: int, tmp_path: Path
) -> None:
    ids = t.routes(1)[0, :-1]
    later, path = ids[start:], tmp_path / "r.json"
    counts = {"prompt_tokens": t.PROMPT, "completion_tokens": t.S - t.PROMPT}
    content = {
        "sglang": t.sglang(later, routed_experts_start_len=start, **counts),
        "object": t.choices([t.payload(later, "uint8", start=start)]) | {"usage": counts},
    }
    path.write_text(json.dumps(content[name]))
    trace = read(path)
    assert np.array_equal(trace.routed_experts[0, start : start + len(later)], later)
    assert (trace.routed_experts[0, :start] == -1).all() and found(trace) == set()


def test_a_later_start_than_the_response_leaves_lost_rows(tmp_path: Path) -> None:
    ids = t.routes(1)[0, 12:-1]
    content = t.sglang(ids, routed_experts_start_len=12, prompt_tokens=8, completion_tokens=16)
    (tmp_path / "r.json").write_text(json.dumps(content))
    assert found(read(tmp_path / "r.json")) == {"lost"}


def test_a_server_that_ignored_the_start_is_refused(tmp_path: Path) -> None:
    content = t.sglang(
        t.routes(1)[0, :-1], routed_experts_start_len=5, prompt_tokens=8, completion_tokens=16
    )
    (tmp_path / "r.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="its start position was applied twice"):
        read(tmp_path / "r.json")


def test_rows_that_repeat_with_their_tokens_are_no_fault(tmp_path: Path) -> None:
    """A collapsed policy says one token over and over, and its routers do the same."""
    ids = t.routes(1)[0, :-1]
    ids[10:22] = ids[10]
    said = [*range(t.PROMPT, 10), *[7] * 12, 8, 9]
    content = {"prompt_token_ids": [*range(t.PROMPT)]}
    for answer, faults in ((said, set()), ([*range(16)], {"runs"})):
        choice = {"token_ids": answer, "routed_experts": ids.tolist()}
        (tmp_path / "r.json").write_text(json.dumps(content | {"choices": [choice]}))
        assert found(read(tmp_path / "r.json")) == faults


def test_completions_without_routes_keep_their_place(tmp_path: Path) -> None:
    ids = t.routes()
    failed = {"custom_id": "x", "response": None, "error": {"message": "too long"}}
    silent = {"choices": [{"text": "", "routed_experts": None}]}
    values = [t.batch_line(0, ids[0]), failed, silent, t.batch_line(1, ids[1])]
    (tmp_path / "b.jsonl").write_bytes(t.lines(values))
    trace = read(tmp_path / "b.jsonl")
    assert np.array_equal(trace.routed_experts[[0, 3]], ids)
    assert (trace.routed_experts[1:3] == -1).all() and found(trace) == {"lost"}
    assert trace.notes[0].startswith("2 of 4 completions have no 'routed_experts'")
    assert "1 failed, the first with {'message': 'too long'}" in trace.notes[0]


# Why a file is refused.


NO_ROUTES: dict[str, tuple[str, Any, str]] = {
    "silent": ("r.json", {"choices": [{"text": ""}]}, "turn the record of routed experts on"),
    "failed": (
        "b.jsonl",
        {"custom_id": "a", "response": {"status_code": 400, "body": "no"}},
        "1 of 1 requests failed, the first with: no",
    ),
    "prompt": (
        "r.json",
        {"prompt_routed_experts": [[[1, 2]]], "choices": [{"text": ""}]},
        "only prompt_routed_experts, the routes of the prompt",
    ),
    "shape": (
        "r.json",
        t.choices([t.payload(t.routes(1)[0], dtype="int16") | {"shape": [3, t.L, t.K]}]),
        "384 bytes for the shape .* of int16; the payload is cut off",
    ),
    "keys": ("r.json", t.choices([{"ids": [1]}]), r"an object with the keys \['ids'\]; expected d"),
    "dtype": ("r.json", t.choices([t.payload(t.routes(1)[0], dtype="fp8")]), "declared as 'fp8'"),
    "narrow": ("r.json", t.sglang(t.routes(1)[0, :3], "uint8"), "of uint8"),
    "envelope": ("r.json", t.choices(["nrlre1:int16:3"]), "no envelope of NeMo-RL"),
    "digests": (
        "r.jsonl",
        {"event": "rollout_payload", "routed_experts": {"valid_sha256": "0" * 64}},
        "digests and previews of routes and not the routes",
    ),
}


@pytest.mark.parametrize("name", NO_ROUTES)
def test_a_refusal_names_its_true_reason(name: str, tmp_path: Path) -> None:
    file, content, words = NO_ROUTES[name]
    if name == "narrow":
        del content["meta_info"]["routed_experts_dtype"]
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=words):
        read(tmp_path / file)


def test_lines_under_the_suffix_of_one_object_are_pointed_out(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_bytes(t.SIGNED["lines.jsonl"](t.routes()))
    with pytest.raises(ValueError, match=r"Extra data.*; name a file of one response a line .jso"):
        read(tmp_path / "r.json")


def test_a_minus_one_without_a_sign_is_pointed_out(tmp_path: Path) -> None:
    np.save(tmp_path / "r.npy", t.spoiled("one row lost").astype(np.uint16))
    with pytest.raises(ValueError, match=r"65535 \(a -1 of an unsigned type\)"):
        read(tmp_path / "r.npy")


@pytest.mark.parametrize("name", ["r.npz", "r.safetensors", "r.json", "r.parquet"])
def test_routes_of_another_name_are_read_by_that_name(name: str, tmp_path: Path) -> None:
    ids = t.routes()
    rows = [{"mine": row.tolist()} for row in ids]
    content = {
        "r.npz": t.npz(mine=ids, other=np.zeros(3)),
        "r.safetensors": t.save({"mine": torch.from_numpy(ids), "other": torch.zeros(3)}),
        "r.json": t.text(rows),
        "r.parquet": t.parquet(rows),
    }
    (tmp_path / name).write_bytes(content[name])
    assert np.array_equal(read_trace(tmp_path / name, array="mine").routed_experts, ids)
    with pytest.raises(ValueError, match="--array"):
        read_trace(tmp_path / name)


# Activation recomputation in a router trace of Megatron-LM.


def trace_lines(passes: list[tuple[int, int]], layers: range, tokens: int = 6) -> list[dict]:
    """Lines of (pass, layer) pairs in the order of the calls; a pass has its own ids."""
    return [
        {
            "step": 0,
            "block": "decoder",
            "layer": layer,
            "num_tokens": tokens,
            "topk": t.K,
            "top_indices": t.routes(1, tokens, seed=number)[0, :, layer].tolist(),
        }
        for number, layer in passes
        if layer in layers
    ]


forward = [(0, layer) for layer in range(t.L)]
second = [(1, layer) for layer in range(t.L)]
ORDERS = {
    "one after the other": [*forward, *forward[::-1], *second, *second[::-1]],
    "of a pipeline": [*forward, *second, *forward[::-1], *second[::-1]],
    "of two layers": [*forward, *forward[:2], *second, *second[:2]],
}


@pytest.mark.parametrize("order", ORDERS)
def test_lines_of_recomputation_are_left_out_and_counted(order: str, tmp_path: Path) -> None:
    plain = trace_lines([*forward, *second], range(t.L))
    twice = trace_lines(ORDERS[order], range(t.L))
    (tmp_path / "a.jsonl").write_bytes(t.lines(plain))
    (tmp_path / "b.jsonl").write_bytes(t.lines(twice))
    once, trace = (read_trace(tmp_path / name) for name in ("a.jsonl", "b.jsonl"))
    assert torch.equal(once.routed_experts, trace.routed_experts) and once.notes == ()
    assert trace.notes[0].startswith(f"{len(twice) - len(plain)} lines hold the ids of a line be")


def test_passes_of_few_tokens_may_look_alike(tmp_path: Path) -> None:
    """Decoding passes of one token, which a router often sends where the last one went."""
    (tmp_path / "a.jsonl").write_bytes(t.lines(trace_lines([*forward, *forward], range(t.L), 1)))
    trace = read_trace(tmp_path / "a.jsonl")
    assert trace.routed_experts.shape[1] == 2 and trace.notes == ()


def wide(experts: int, seed: int = 0) -> np.ndarray:
    draws = np.random.default_rng(seed).random((t.B, t.S, t.L, experts))
    return draws.argsort(axis=-1)[..., : t.K].astype(np.int32)


@pytest.mark.parametrize("experts", [257, 384, 512])
def test_ids_that_went_through_8_bits_are_found(experts: int) -> None:
    """vLLM writes uint8 where it can, and a client that reads every file so loses experts."""
    ids = torch.from_numpy(wide(experts))
    assert failing(ids, experts) == set()
    cut = torch.from_numpy(wide(experts).astype(np.uint8).astype(np.int32))
    # One expert of 257 may be missing by chance in so few tokens.
    assert ("width" in failing(cut, experts)) == (experts > 257)


def failing(ids: torch.Tensor, experts: int) -> set[str]:
    return {law.check for law in check_trace(ids, num_experts=experts) if law.passed is False}


def test_ids_of_physical_experts_are_named() -> None:
    """Redundant experts (EPLB) have ids of their own beyond those of the model."""
    ids = torch.from_numpy(t.routes())
    ids[0, 9, 2, 0] = t.E + 3
    (law,) = [law for law in check_trace(ids, num_experts=t.E) if law.passed is False]
    assert law.check == "ids" and "physical experts" in law.reason
