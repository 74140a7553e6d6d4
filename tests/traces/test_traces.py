"""Foreign traces: files written to the published layouts, whole, cut off and corrupted."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_rl.replay_check import check_trace
from moe_rl.replay_check.families import build_family
from moe_rl.routing import find_routers, record_routing, replay_routing
from moe_rl.traces import fit_to_model, read_trace, write_trace
from moe_rl.traces.encodings import decode_routes
from moe_rl.traces.files import same_tokens
from moe_rl.traces.foreign import stack_rows

E, K, L, S = 8, 2, 3, 7


def routes(rows: int = 2, length: int = S, seed: int = 0) -> np.ndarray:
    """Ids `[B, S, L, K]`, different within a token."""
    draws = np.random.default_rng(seed).random((rows, length, L, E))
    return draws.argsort(axis=-1)[..., :K].astype(np.int32)


def write(path: Path, content) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def sglang(row: np.ndarray) -> str:
    return base64.b64encode(row.astype("<i4").tobytes()).decode()


def megatron(row: np.ndarray, rank: int = 0, split: int | None = None) -> str:
    """Lines as megatron/core's router tracer writes them; `split` cuts the tokens in two passes."""
    lines = []
    for step, part in enumerate([row] if split is None else [row[:split], row[split:]]):
        for layer in (10, 2, 4):  # any order, numbered by decoder layer
            index = sorted((10, 2, 4)).index(layer)
            line = {"step": step, "stage": "pre_dispatch", "block": "decoder", "layer": layer}
            line |= {"rank": rank, "num_tokens": len(part), "topk": K}
            lines.append(json.dumps(line | {"top_indices": part[:, index].tolist()}))
        mtp = {"step": step, "block": "mtp", "mtp_idx": 0, "layer": 0, "num_tokens": 1, "topk": 1}
        lines.append(json.dumps(mtp | {"top_indices": [[0]]}))
    return "\n".join(lines) + "\n"


# Whole files.


def test_vllm_of_one_array_a_completion(tmp_path) -> None:
    """0.14: every decoder layer, int32; 0.22 and later: MoE layers, int16. Both [S-1, L, K]."""
    ids = routes()
    choices = [{"index": i, "routed_experts": row.tolist()} for i, row in enumerate(ids)]
    trace = read_trace(write(tmp_path / "r.json", {"choices": choices}))
    assert trace.source == "vLLM"
    assert trace.routed_experts.dtype == torch.int16
    assert np.array_equal(trace.routed_experts, ids)


def test_the_token_that_was_never_fed_has_a_place(tmp_path) -> None:
    """S - 1 rows of S tokens: all S are there to be compared, the last without a route."""
    ids = routes()
    length = ids.shape[1] + 1
    tokens = list(range(1, length + 1))
    choices = [{"token_ids": tokens[2:], "routed_experts": row.tolist()} for row in ids]
    trace = read_trace(
        write(tmp_path / "r.json", {"prompt_token_ids": tokens[:2], "choices": choices})
    )
    assert trace.tokens is not None and trace.tokens[0].tolist() == tokens
    assert trace.response is not None and trace.response.sum(1).tolist() == [length - 2] * len(ids)
    assert np.array_equal(trace.routed_experts[:, :-1], ids)
    assert (trace.routed_experts[:, -1] == -1).all()


def test_vllm_with_prompt_and_generation_apart(tmp_path) -> None:
    """0.21: the prompt's routes once, those of each completion beside them, -1 where cached."""
    ids = routes()
    ids[:, :2] = -1
    ids[1, :4] = ids[0, :4]
    content = {
        "prompt_routed_experts": ids[0, :4].tolist(),
        "choices": [{"routed_experts": row[4:].tolist()} for row in ids],
    }
    trace = read_trace(write(tmp_path / "r.json", content))
    assert trace.source == "vLLM 0.21"
    assert np.array_equal(trace.routed_experts, ids)
    np.savez(tmp_path / "r.npz", routed_experts=ids[0, 4:], prompt_routed_experts=ids[0, :4])
    assert np.array_equal(read_trace(tmp_path / "r.npz").routed_experts[0], ids[0])


def test_arrays_in_base64(tmp_path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, routes()[0].astype(np.int16))
    content = {"outputs": [{"routed_experts": base64.b64encode(buffer.getvalue()).decode()}]}
    trace = read_trace(write(tmp_path / "r.json", content))
    assert np.array_equal(trace.routed_experts, routes()[:1])


def test_sglang_of_one_and_of_several_requests(tmp_path) -> None:
    ids = routes()
    short = ids[1, :4]
    content = [{"text": "", "meta_info": {"routed_experts": sglang(r)}} for r in (ids[0], short)]
    trace = read_trace(write(tmp_path / "r.json", content), num_layers=L, top_k=K)
    assert trace.source == "SGLang"
    assert np.array_equal(trace.routed_experts[0], ids[0])
    assert np.array_equal(trace.routed_experts[1, :4], short)
    assert (trace.routed_experts[1, 4:] == -1).all()
    said = {"routed_experts": sglang(ids[0])}
    for one in ({"sglext": said}, {"meta_info": said, "sglext": said}):  # said twice, read once
        trace = read_trace(write(tmp_path / "one.json", one), num_layers=L, top_k=K)
        assert np.array_equal(trace.routed_experts, ids[:1])


def test_megatron_by_file_by_folder_and_by_micro_batch(tmp_path) -> None:
    ids = routes()
    file = write(tmp_path / "router_trace_rank0.jsonl", megatron(ids[0], split=3))
    trace = read_trace(file)
    assert trace.source == "Megatron-LM"
    assert np.array_equal(trace.routed_experts, ids[:1])
    write(tmp_path / "router_trace_rank1.jsonl", megatron(ids[1], rank=1))
    assert np.array_equal(read_trace(tmp_path).routed_experts, ids)
    flat = ids.transpose(1, 0, 2, 3).reshape(-1, L, K)  # Megatron's [S, B]
    file = write(tmp_path / "batch.jsonl", megatron(flat))
    assert np.array_equal(read_trace(file, batch_size=2).routed_experts, ids)


def test_megatron_ranks_are_rows_in_their_order(tmp_path: Path) -> None:
    ids = routes(12)
    for rank in range(12):
        write(tmp_path / f"router_trace_rank{rank}.jsonl", megatron(ids[rank], rank=rank))
    assert np.array_equal(read_trace(tmp_path).routed_experts, ids)
    stage = megatron(ids[0]).replace('"layer": 10', '"layer": 11')
    write(tmp_path / "router_trace_rank3.jsonl", stage)
    with pytest.raises(ValueError, match=r"rank3.jsonl': \[2, 4, 11\].*stages of"):
        read_trace(tmp_path)


@pytest.mark.parametrize("ending", ["npz", "npy", "safetensors"])
def test_plain_arrays_and_our_own_files(tmp_path, ending) -> None:
    path = tmp_path / f"r.{ending}"
    for ids in (routes(), np.asfortranarray(routes()), routes().astype(">i8")):
        if ending == "npz":
            np.savez_compressed(path, routed_experts=ids, tokens=np.zeros(3))
        elif ending == "npy":
            np.save(path, ids)
        else:
            write_trace(path, torch.from_numpy(ids.astype(np.int16)))
        assert np.array_equal(read_trace(path).routed_experts, ids)


# Fitting to a model, and there replaying.


def test_a_record_of_all_decoder_layers_without_the_last_token_replays() -> None:
    model = build_family("qwen3_moe", num_hidden_layers=3, mlp_only_layers=[1])
    tokens = torch.randint(2, 60, (2, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), record_routing(model) as recorded:
        plain = model(tokens).logits
    own = recorded.routed_experts
    given = torch.zeros(2, 5, 3, 2, dtype=torch.int32)
    given[:, :, [0, 2]] = own[:, :5].int()
    fitted = fit_to_model(given, model, num_tokens=6)
    assert torch.equal(fitted[:, :5].short(), own[:, :5]) and (fitted[:, 5] == -1).all()
    with torch.no_grad(), replay_routing(model, fitted):
        assert torch.equal(model(tokens).logits, plain)
    assert torch.equal(fit_to_model(own, model, num_tokens=6), own)
    with pytest.raises(ValueError, match="1 layers, but the model has 2 MoE layers of 3"):
        fit_to_model(own[:, :, :1], model)
    one_more = torch.cat([own, own[:, :, :1]], dim=2)
    with pytest.raises(ValueError, match=r"4 layers, .*multi-token-prediction layer"):
        fit_to_model(torch.cat([one_more, own[:, :, :1]], dim=2), model)
    with pytest.raises(ValueError, match="4 positions for 6 tokens"):
        fit_to_model(own[:, :4], model, num_tokens=6)
    assert [tap.decoder_layer for tap in find_routers(model)] == [0, 2]


# Corrupted files: one line that begins with the path.

BAD_JSON = {
    '{"choices": [{"routed_experts": [[[1, 2]': "not JSON",
    '{"choices": [{"text": "hello"}]}': "no response in it has 'routed_experts'",
    '{"choices": [{"routed_experts": null}]}': "no response in it has 'routed_experts'",
    "5": "no response in it has 'routed_experts'",
    '{"routed_experts": [[[0.5, 1.0]]]}': "expected integer ids",
    '{"routed_experts": [[["a", "b"]]]}': "expected integer ids",
    '{"routed_experts": [0, 1, 2]}': "expected integer ids",
    '{"routed_experts": [[[0, 1], [2]]]}': "inhomogeneous shape",
    '[{"routed_experts": [[[0, 1]]]}, {"routed_experts": [[[0, 1], [2, 3]]]}]': "of one model",
    '{"routed_experts": [[[0, 70000]]]}': "ids from 0 to 70000",
    '{"meta_info": {"routed_experts": "%%%"}}': "base64",
}


@pytest.mark.parametrize(("content", "words"), BAD_JSON.items())
def test_a_bad_response_is_one_line_with_the_path(tmp_path, content, words) -> None:
    path = write(tmp_path / "bad.json", content)
    with pytest.raises(ValueError, match=rf"bad\.json: .*{words}"):
        read_trace(path, num_layers=L, top_k=K)


def test_text_in_place_of_arrays_is_one_line(tmp_path) -> None:
    for name in ("text.npz", "text.npy"):
        path = tmp_path / name
        path.write_text("text")
        with pytest.raises(ValueError, match=rf"{name}: no arrays of numbers"):
            read_trace(path)


def test_flat_bytes_without_sizes_say_what_is_needed(tmp_path) -> None:
    path = write(tmp_path / "r.json", {"meta_info": {"routed_experts": sglang(routes()[0])}})
    with pytest.raises(ValueError, match=r"pass num_layers .* and top_k"):
        read_trace(path)
    with pytest.raises(ValueError, match=r"168 bytes are no whole number of tokens of 5 layers"):
        read_trace(path, num_layers=5, top_k=K)


BAD_MEGATRON = {
    "a line cut off": (lambda x: [*x[:4], x[4][:30]], "line 5: not of a router trace"),
    "a line that is a list": (lambda x: ["[]", *x], "line 1: not of a router trace"),
    "a key missing": (lambda x: ['{"step": 0}', *x], "line 1: .*KeyError.'layer'"),
    "another K": (lambda x: [x[0].replace('"topk": 2', '"topk": 3')], "line 1: .*reshape"),
    "uneven lists": (lambda x: [x[0].replace("[[", "[[7, ")], "line 1: .*inhomogeneous"),
    "floats": (lambda x: [x[0].replace("[[", "[[0.")], "expected integer ids"),
    "no decoder layer": (lambda x: [x[3]], "expected integer ids"),
    "the last layers lost": (lambda x: x[:-2], "step 1 of r.jsonl: .*cut off"),
    "a layer lost in each step": (lambda x: [*x[1:5], *x[6:]], "step 1 of r.jsonl: .*cut off"),
    "a line of another step": (lambda x: [x[4], *x[1:4], x[0], *x[5:]], "out of order"),
    "backwards": (lambda x: x[::-1], "line 6: step 0 after step 1: out of order"),
    "a step that comes again": (lambda x: x + x[:4], "line 9: step 0 after step 1"),
}


@pytest.mark.parametrize("what", BAD_MEGATRON)
def test_a_bad_router_trace_names_the_line_or_step(what: str, tmp_path: Path) -> None:
    """Steps of as many tokens each, so that counts alone do not tell."""
    change, words = BAD_MEGATRON[what]
    changed = change(megatron(routes(1, 6)[0], split=3).splitlines())
    with pytest.raises(ValueError, match=rf"r\.jsonl: .*{words}"):
        read_trace(write(tmp_path / "r.jsonl", "\n".join(changed)))


def test_other_files_are_refused(tmp_path) -> None:
    np.savez(tmp_path / "other.npz", routes=routes())
    np.save(tmp_path / "float.npy", routes().astype(float))
    np.save(tmp_path / "empty.npy", routes()[:0])
    (tmp_path / "none.txt").write_text("")
    (tmp_path / "folder").mkdir()
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(ValueError, match=path.name):
            read_trace(path)
    for name in ("nowhere.npz", "nowhere.json", "nowhere.jsonl", "nowhere.safetensors"):
        with pytest.raises(FileNotFoundError, match=name):
            read_trace(tmp_path / name)


@given(data=st.data())
def test_any_record_survives_every_layout(data, tmp_path_factory) -> None:
    rows, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6))
    ids = routes(rows, length, seed=data.draw(st.integers(0, 99)))
    tmp_path = tmp_path_factory.mktemp("traces")
    write_trace(tmp_path / "a.safetensors", torch.from_numpy(ids))
    content = [{"meta_info": {"routed_experts": sglang(row)}} for row in ids]
    write(tmp_path / "b.json", content)
    write(tmp_path / "c.json", {"choices": [{"routed_experts": row.tolist()} for row in ids]})
    flat = ids.transpose(1, 0, 2, 3).reshape(-1, L, K)
    write(tmp_path / "d.jsonl", megatron(flat))
    for name in ("a.safetensors", "b.json", "c.json", "d.jsonl"):
        trace = read_trace(tmp_path / name, num_layers=L, top_k=K, batch_size=rows)
        assert np.array_equal(trace.routed_experts, ids), name


# What can be wrong inside a record.


def broken(ids: np.ndarray | torch.Tensor, num_experts: int | None = E) -> dict[str, str]:
    found = check_trace(torch.as_tensor(ids), num_experts=num_experts)
    return {f.check: f.reason for f in found if f.passed is False}


def test_a_good_record_has_no_findings() -> None:
    ids = routes()
    assert broken(ids) == {}
    ids[0, -1] = -1
    ids[1, :3, 1] = -1
    assert broken(ids) == {}
    assert broken(routes(), None) == {}


def test_a_few_tokens_of_a_small_model_may_choose_the_first_experts() -> None:
    """Of 256 unknown tokens, which may all be one, 4 choose 0 and 1 in both layers."""
    draw = np.random.default_rng(0)
    ids = draw.permuted(np.broadcast_to(np.arange(8), (32, 8, 2, 8)), axis=-1)[..., :2]
    ids[2, [1, 3, 5, 7]] = range(2)
    assert broken(ids, 8) == {}


def edit(change) -> np.ndarray:
    ids = routes()
    change(ids)
    return ids


@pytest.mark.parametrize(
    ("check", "change", "words"),
    [
        ("ids", lambda x: x.__setitem__((0, 1, 2, 0), 8), "an id of 8 for 8 experts"),
        ("ids", lambda x: x.__setitem__((0, 1, 2), -3), "an id of -3"),
        ("distinct", lambda x: x.__setitem__((1, 4, 2), 5), r"\[1, 4, 2\] names an expert twice"),
        ("zeros", lambda x: x.__setitem__(slice(None), 0), "the engine recorded nothing"),
        ("zeros", lambda x: x.__setitem__((slice(None), slice(None), 1), 0), r"layers \[1\] are"),
        ("last token", lambda x: x.__setitem__((slice(None), -1), 0), r"2 tokens .*\[0, 6\]"),
        ("gaps", lambda x: x.__setitem__((0, 2, 1, 1), -1), r"\[0, 2, 1\] has some ids only"),
        ("gaps", lambda x: x.__setitem__(slice(None), -1), "no token has a record"),
        ("layers", lambda x: x.__setitem__((..., 2, slice(None)), x[..., 0, ::-1]), "copy of"),
        ("tokens", lambda x: x.__setitem__(slice(None), x[:1, :1].copy()), "every token goes to"),
    ],
)
def test_each_way_to_be_wrong_is_found(check, change, words) -> None:
    import re

    found = broken(edit(change))
    assert check in found and re.search(words, found[check]), found


def test_a_dense_control_is_no_copy() -> None:
    ids = np.broadcast_to(np.arange(2), (2, S, L, 2)).copy()
    assert broken(ids, 2) == {}


def test_what_is_no_record_at_all_is_an_error() -> None:
    for bad in (torch.zeros(2, 3, 2), torch.zeros(1, 2, 3, 2), torch.zeros(0, 1, 1, 1).int()):
        with pytest.raises(ValueError, match="pass integer ids"):
            check_trace(bad)
    with pytest.raises(ValueError, match="expected integer ids"):
        stack_rows([])
    with pytest.raises(ValueError, match="no whole number"):
        decode_routes("", num_layers=0, top_k=2)


def test_records_that_differ_by_the_last_row_are_of_the_same_tokens() -> None:
    a = torch.as_tensor(routes())
    left, right = same_tokens(a, a[:, :-1])
    assert torch.equal(left, right)
    for other in (a[:, :-2], a[:1], a[:, :, :1]):
        with pytest.raises(ValueError, match="Compare two records of the same tokens"):
            same_tokens(a, other)


PROMPT, SAMPLED, USER = [9, 1, 2, 3], [*range(20, 40)], [5, 6, 7]


def found_in(*turns: tuple[list[int], list[int]]) -> dict[str, str]:
    """What is found in turns, each a prompt and a response."""
    length = max(len(prompt) + len(response) for prompt, response in turns)
    ids, tokens = routes(len(turns), length), torch.full((len(turns), length), -1)
    response_rows = torch.zeros(len(turns), length, dtype=torch.bool)
    for i, (prompt, response) in enumerate(turns):
        end = len(prompt) + len(response)
        tokens[i, :end] = torch.tensor(prompt + response)
        response_rows[i, len(prompt) - 1 : end - 1] = True
        ids[i, end:] = -1
    found = check_trace(torch.from_numpy(ids), tokens=tokens, response=response_rows)
    return {f.check: f.reason for f in found if f.passed is False}


def turns(*later: list[int]) -> dict[str, str]:
    """What is found in a turn, and one with that prompt."""
    prompt = [token for part in later for token in part]
    return found_in((PROMPT, SAMPLED), (prompt, [*range(100, 110)]))


@pytest.mark.parametrize(
    "later",
    [
        [SAMPLED, USER],
        [SAMPLED[:-1], [4], USER],  # another end of turn, which was never fed
        [SAMPLED[:-3], USER],  # without the blanks and the end of the turn
        [SAMPLED[:14], [*range(50, 70)], USER],  # cut behind a call of a tool, which has answered
        [SAMPLED[:15], [*range(50, 55)], USER],  # of another sample with the same beginning
        [[20, *range(50, 69)], USER],  # of another sample
        [[*range(50, 70)], USER],
    ],
)
def test_turns_that_keep_what_was_sampled_are_no_fault(later: list[list[int]]) -> None:
    assert turns(PROMPT, *later) == {}
    assert turns([9, 1, 2, 8], *later) == {}  # another conversation


@pytest.mark.parametrize("written", [[33], [33, 34], [33, 34, 35, 36]])
@pytest.mark.parametrize("at", [0, 5])
def test_a_turn_that_was_tokenised_anew_is_found(at: int, written: list[int]) -> None:
    """Two sampled tokens have become others; behind them all is as it was sampled."""
    found = turns(PROMPT, SAMPLED[:at], [50 + n for n in written], SAMPLED[at + 2 :], USER)
    assert list(found) == ["turns"]
    words = f"holds token 83 at position {4 + at} where {20 + at} was sampled"
    assert words in found["turns"]


def test_of_several_turns_the_last_one_counts() -> None:
    """The first is as it was sampled; the second is not."""
    second, answer, end = PROMPT + SAMPLED + USER, [*range(60, 80)], [*range(100, 110)]
    third = second + answer[:5] + [33] + answer[7:] + USER
    found = found_in((PROMPT, SAMPLED), (second, answer), (third, end))
    assert "sequence 2 goes on from sequence 1 and holds token 33" in found["turns"]
    assert found_in((PROMPT, SAMPLED), (second, answer), (second + answer + USER, end)) == {}
