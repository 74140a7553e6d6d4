"""`moe-rl check-replay` and `moe-rl churn` as a user meets them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import Here

from moe_rl.replay_check.compare import compare, usable
from moe_rl.replay_check.families import build_family, family_names


def routes(seed: int = 0) -> np.ndarray:
    draws = np.random.default_rng(seed).random((2, 40, 3, 8))
    return draws.argsort(axis=-1)[..., :2].astype(np.int16)


@pytest.mark.slow
def test_every_family_passes_in_one_command(here: Here) -> None:
    done = here("check-replay", "--all")
    assert done.returncode == 0, done.stdout + done.stderr
    shown = {line.split()[0] for line in done.stdout.splitlines() if line[:1].strip()}
    assert {*family_names(), "phimoe", "doge"} <= shown
    assert "FAIL" not in done.stdout
    assert f"{len(family_names())} of {len(family_names())} families pass" in done.stdout


def test_a_model_folder_is_checked_and_a_broken_trace_fails(tmp_path: Path, here: Here) -> None:
    build_family("mixtral").save_pretrained(tmp_path / "model")
    good = here("check-replay", "model")
    assert good.returncode == 0, good.stdout + good.stderr
    assert "1 of 1 model pass" in good.stdout and "mixtral" in good.stdout
    ids = routes()
    np.savez(tmp_path / "good.npz", routed_experts=ids)
    assert here("check-replay", "good.npz").returncode == 0
    ids[:, -1] = 0
    np.savez(tmp_path / "bad.npz", routed_experts=ids)
    bad = here("check-replay", "bad.npz", "--num-experts", "8")
    assert bad.returncode == 1
    assert "last token" in bad.stdout and "FAIL" in bad.stdout and "-1, or expert 0" in bad.stdout


def test_a_note_of_the_reader_is_printed_and_a_lost_completion_fails(
    tmp_path: Path, here: Here
) -> None:
    done = {"custom_id": "a", "response": {"body": {"choices": [{"mine": routes()[0].tolist()}]}}}
    failed = {"custom_id": "b", "response": None, "error": "too long"}
    (tmp_path / "b.jsonl").write_text(f"{json.dumps(done)}\n{json.dumps(failed)}\n")
    for words, code in ((["check-replay", "b.jsonl"], 1), (["churn", "b.jsonl", "b.jsonl"], 0)):
        run = here(*words, "--array", "mine")
        assert run.returncode == code, run.stderr
        assert "1 of 2 completions have no 'mine'" in run.stdout
        assert ("FAIL  1 sequences have no record" in run.stdout) == bool(code)


def test_churn_prints_and_plots(tmp_path: Path, here: Here) -> None:
    a, b = routes(), routes()
    b[:, 20:, 1] = (b[:, 20:, 1] + 4) % 8
    np.savez(tmp_path / "a.npz", routed_experts=a)
    np.save(tmp_path / "b.npy", b[:, :-1])
    done = here("churn", "a.npz", "b.npy", "--plot", "out/churn.svg")
    assert done.returncode == 0, done.stderr
    assert "token disagreement" in done.stdout
    assert "<svg" in (tmp_path / "out/churn.svg").read_text()


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([3, -7], "b.npz: an id of -7; only -1 may be negative"),
        ([3, 3], "b.npz: [b, s, l] = [0, 3, 0] names an expert twice"),
        ([3, -1], "b.npz: [b, s, l] = [0, 3, 0] has some ids only"),
    ],
)
def test_churn_of_routes_that_no_router_chose_is_refused(
    ids: list[int], words: str, tmp_path: Path, here: Here
) -> None:
    damaged = routes()
    damaged[0, 3, 0] = ids
    np.savez(tmp_path / "a.npz", routed_experts=routes())
    np.savez(tmp_path / "b.npz", routed_experts=damaged)
    done = here("churn", "a.npz", "b.npz")
    assert (done.returncode, done.stdout) == (2, "") and words in done.stderr
    assert here("check-replay", "b.npz").returncode == 1


def test_a_fill_of_zeros_is_no_agreement() -> None:
    """A dense layer and the token that was never fed, as engines of all layers hand them over."""
    a, b = torch.from_numpy(routes()), torch.from_numpy(routes())
    b[:, 20:, 1] = (b[:, 20:, 1] + 4) % 8
    expected = compare(a[:, :-1, 1:], b[:, :-1, 1:])
    for record in (a, b):
        record[:, :, 0] = 0
        record[:, -1] = 0
    pairs = [usable(record, Path("t.npz")) for record in (a, b)]
    found = compare(*(record for record, _ in pairs))
    assert (found.churn, found.tokens) == (expected.churn, expected.tokens)
    assert np.isnan(found.by_layer[0]).all()
    rows = 2 * (40 + 2)  # a layer, and two more layers of the last token
    assert pairs[0][1].startswith(f"t.npz: {rows} (token, layer) pairs ")
    one = torch.tensor([[[[0], [1]], [[1], [0]]]])  # with one expert a token a zero is a choice
    assert torch.equal(usable(one, Path("t.npz"))[0], one)


def test_a_comparison_worked_out_by_hand() -> None:
    a = torch.tensor([[[[0, 1], [2, 3]], [[0, 1], [2, 3]], [[4, 5], [6, 7]], [[-1, -1], [0, 1]]]])
    b = torch.tensor([[[[1, 0], [2, 3]], [[0, 2], [2, 3]], [[0, 1], [6, 4]], [[0, 1], [0, 1]]]])
    result = compare(a, b)
    assert result.tokens == 4
    assert result.churn == pytest.approx((0 + 0.5 + 1 + 0 + 0 + 0.5 + 0) / 7)
    assert result.router_disagreement == pytest.approx(3 / 7)
    assert result.token_disagreement == pytest.approx(2 / 4)
    np.testing.assert_allclose(result.by_layer, [[1.5 / 3, 2 / 3], [0.5 / 4, 1 / 4]], rtol=1e-6)
    assert result.bins == [(0, 0), (1, 1), (2, 2), (3, 3)]
    np.testing.assert_allclose(result.by_position[2], [0.75, 1, 1])
    with pytest.raises(ValueError, match="no token has a record in both"):
        compare(a, torch.full_like(a, -1))
