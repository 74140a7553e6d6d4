"""Routes of engines beside the tokens of a padded batch."""

import base64
import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import trace_faults
from tiny_trl import tiny_model

from moe_rl.integrations.engine_routes import (
    as_array,
    check_record,
    join_prompts,
    lay_out,
    vllm_routes,
)

LENGTHS = [(2, 3), (4, 1), (1, 2)]  # prompt and response tokens of each sequence
PROMPT, WIDTH = 4, 8  # padded


def routes(tokens: int, layers: int = 2, seed: int = 0) -> np.ndarray:
    draws = np.random.default_rng(seed).random((tokens, layers, 8))
    return draws.argsort(-1)[..., :2].astype(np.int16)


def rows(missing: int = 0, layers: int = 2) -> list[np.ndarray]:
    return [routes(sum(both) - missing, layers, seed) for seed, both in enumerate(LENGTHS)]


@pytest.mark.parametrize("missing", [0, 1])
def test_each_token_finds_its_own_row(missing: int) -> None:
    given = rows(missing)
    batch = lay_out(given, LENGTHS, prompt_length=PROMPT, length=WIDTH, model=tiny_model())
    assert batch.shape == (3, WIDTH, 2, 2) and batch.dtype == torch.int16
    for index, (prompt, response) in enumerate(LENGTHS):
        tokens = [batch[index, PROMPT - prompt + i] for i in range(prompt + response)]
        for token, row in zip(tokens, given[index], strict=False):
            assert torch.equal(token, torch.from_numpy(row))
        assert bool((tokens[-1] < 0).all()) == bool(missing)
        assert (batch[index, : PROMPT - prompt] < 0).all()
        assert (batch[index, PROMPT + response :] < 0).all()


def test_a_record_of_every_decoder_layer_keeps_those_with_a_router() -> None:
    model = tiny_model(num_hidden_layers=3, mlp_only_layers=[1])
    given = rows(layers=3)
    batch = lay_out(given, LENGTHS, prompt_length=PROMPT, length=WIDTH, model=model)
    expected = torch.from_numpy(given[0][:, [0, 2]])
    assert torch.equal(batch[0, PROMPT - 2 : PROMPT + 3], expected)


def npy(array: np.ndarray) -> str:
    file = io.BytesIO()
    np.save(file, array)
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize("form", [lambda a: a, torch.from_numpy, lambda a: a.tolist(), npy])
def test_every_form_of_the_ids_is_the_same_array(form: Any) -> None:
    assert np.array_equal(as_array(form(routes(5)), 0), routes(5))


def test_prompts_and_responses_apart_are_joined() -> None:
    whole = routes(5)
    joined = join_prompts([whole[3:]], [whole[:3]])
    assert np.array_equal(joined[0], whole)


def test_vllms_outputs_become_one_row_a_completion() -> None:
    first, second, third = routes(5, seed=1), routes(6, seed=2), routes(4, seed=3)
    completions = [SimpleNamespace(routed_experts=array) for array in (first, second)]
    apart = SimpleNamespace(
        prompt_routed_experts=third[:2], outputs=[SimpleNamespace(routed_experts=third[2:])]
    )
    found = vllm_routes([SimpleNamespace(outputs=completions), apart])
    for array, expected in zip(found, (first, second, third), strict=True):
        assert np.array_equal(array, expected)
    silent = SimpleNamespace(outputs=[SimpleNamespace(routed_experts=None)])
    with pytest.raises(ValueError, match="enable_return_routed_experts=True"):
        vllm_routes([silent])


@pytest.mark.parametrize("value", [None, [[[1, 2]], [[1]]], base64.b64encode(b"1234").decode()])
def test_what_is_no_array_is_refused(value: Any) -> None:
    with pytest.raises(ValueError):
        as_array(value, 7)


def test_every_fault_of_a_record_is_refused() -> None:
    """On the way that R3 takes: laid beside a padded batch, then checked."""
    model = tiny_model(num_experts=trace_faults.E, num_hidden_layers=trace_faults.L)
    response = trace_faults.S - trace_faults.PROMPT
    lengths = [(trace_faults.PROMPT, response), (trace_faults.PROMPT, response)]
    width = {"prompt_length": trace_faults.PROMPT + 3}
    tokens = torch.from_numpy(trace_faults.tokens())
    tokens = torch.nn.functional.pad(tokens, (3, 2))

    def check(ids: np.ndarray) -> None:
        record = lay_out(ids, lengths, length=tokens.shape[1], model=model, **width)
        check_record(record, tokens, [[1] * response] * 2, model=model, **width)

    check(trace_faults.routes())
    for fault in trace_faults.FAULTS:
        with pytest.raises(ValueError, match=r"^routed_experts: "):
            check(trace_faults.spoiled(fault))


def test_objects_and_envelopes_are_read_like_arrays() -> None:
    ids = trace_faults.routes(1)[0]
    for form in (trace_faults.payload(ids, "uint8"), trace_faults.nemo(ids)):
        assert np.array_equal(as_array(form, 0), ids)
