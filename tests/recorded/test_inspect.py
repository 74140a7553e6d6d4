"""Recorded batches: every layout gives the same numbers, and what is wrong in one is told."""

import json
import math
import re
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_rl.commands.cli import main
from moe_rl.config import ConfigError
from moe_rl.recorded import RecordedBatch, inspect_batch, read_batch, write_batch
from moe_rl.recorded.findings import findings
from moe_rl.recorded.trl_log import inspect_log
from moe_rl.replay_check.check_trace import TRACE_LAWS, check_trace

B, SP, T, L, K, E = 18, 5, 20, 3, 2, 16


def drawn(vocabulary: int = 50) -> RecordedBatch:
    """Tokens that mu sampled, and two other policies near it."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(B, T, vocabulary, generator=rng, dtype=torch.float64)
    other, third = (
        logits + 0.2 * torch.randn(logits.shape, generator=rng, dtype=torch.float64)
        for _ in range(2)
    )
    tokens = torch.multinomial(logits.softmax(-1).flatten(0, 1), 1, generator=rng).view(B, T, 1)

    def of(scores: Tensor) -> Tensor:
        return scores.log_softmax(-1).gather(-1, tokens).squeeze(-1).float()

    routes = torch.rand(B, T, L, E, generator=rng).topk(K, dim=-1).indices.to(torch.int16)
    trainer = routes.clone()
    trainer[:, ::5, 1] = (trainer[:, ::5, 1] + 1) % E
    lengths = torch.randint(6, T + 1, (B, 1), generator=rng)
    advantages = torch.randn(B, 1, generator=rng).expand(B, T).contiguous()
    return RecordedBatch(
        source="moe-rl", mask=torch.arange(T) < lengths, logprobs=of(third),
        old_logprobs=of(other), rollout_logprobs=of(logits), advantages=advantages,
        routes=routes, trainer_routes=trainer,
    )  # fmt: skip


def whole(values: Tensor, fill: float = 0) -> Tensor:
    """Values of response tokens, with SP prompt tokens in front."""
    front = values.new_full((B, SP, *values.shape[2:]), fill)
    return torch.cat([front, values], dim=1)


def where_read(routes: Tensor) -> Tensor:
    """Routes [B, SP + T, L, K] by the position of the token that is read, prompts included."""
    prompt = torch.arange(K, dtype=torch.int16) + torch.arange(SP - 1, dtype=torch.int16)[:, None]
    prompt = prompt[None, :, None].expand(B, SP - 1, L, K)
    last = torch.full((B, 1, L, K), -1, dtype=torch.int16)
    return torch.cat([prompt, routes, last], dim=1)


def as_ours(batch: RecordedBatch, folder: Path) -> Path:
    write_batch(folder / "batch.safetensors", batch)
    return folder / "batch.safetensors"


def as_verl(batch: RecordedBatch, folder: Path) -> Path:
    """The fields of a DataProto, by verl's names; routes of whole sequences."""
    save_file(
        {
            "prompts": torch.zeros(B, SP, dtype=torch.int64),
            "response_mask": batch.mask.long(),
            "log_probs": batch.logprobs,
            "old_log_probs": batch.old_logprobs,
            "rollout_log_probs": batch.rollout_logprobs,
            "advantages": batch.advantages,
            "routed_experts": where_read(batch.routes),
            "trainer_routed_experts": where_read(batch.trainer_routes),
        },
        folder / "verl.safetensors",
    )
    return folder / "verl.safetensors"


def as_numpy(batch: RecordedBatch, folder: Path) -> Path:
    names = {"mask": "response_mask", "advantages": "advantages", "logprobs": "logprobs"}
    names |= {"old_logprobs": "old_logprobs", "rollout_logprobs": "rollout_logprobs"}
    names |= {"routes": "routes", "trainer_routes": "trainer_routes"}
    np.savez(folder / "batch.npz", **{n: getattr(batch, f).numpy() for f, n in names.items()})
    return folder / "batch.npz"


def as_nemo(batch: RecordedBatch, folder: Path) -> Path:
    """NeMo-RL's training data: a list around each sequence, prompts included; ours by its names."""
    path = folder / "train_data_step1.jsonl"
    columns = {
        "curr_logprobs": whole(batch.logprobs),
        "prev_logprobs": whole(batch.old_logprobs),
        "generation_logprobs": whole(batch.rollout_logprobs),
        "advantages": whole(batch.advantages),
        "token_mask": whole(batch.mask.float()),
        "routed_experts": where_read(batch.routes),
        "trainer_routed_experts": where_read(batch.trainer_routes),
    }
    with path.open("w") as file:
        for i in range(B):
            row: dict[str, Any] = {"idx": i, "step": 1, "input_lengths": [SP + T]}
            row |= {name: [value[i].tolist()] for name, value in columns.items()}
            file.write(json.dumps(row | {"sample_mask": [1.0]}) + "\n")
    return path


def as_prime(batch: RecordedBatch, folder: Path) -> Path:
    """prime-rl's token exports of two ranks: no old log-probs, and no routes."""
    columns = {
        "trainer_logprobs": whole(batch.logprobs),
        "inference_logprobs": whole(batch.rollout_logprobs),
        "advantages": whole(batch.advantages),
        "loss_mask": whole(batch.mask),
    }
    step = folder / "token_exports" / "step_3"
    step.mkdir(parents=True)
    for rank, rows in enumerate((range(B // 2), range(B // 2, B))):
        with (step / f"rank_{rank}.jsonl").open("w") as file:
            for i in rows:
                row: dict[str, Any] = {"schema_version": 1, "step": 3, "rank": rank}
                row |= {name: value[i].tolist() for name, value in columns.items()}
                row["entropy"] = [None] * (SP + T)
                file.write(json.dumps(row, separators=(",", ":")) + "\n")
    return folder / "token_exports"


WHOLE = {"ours": as_ours, "verl": as_verl, "numpy": as_numpy, "NeMo-RL": as_nemo}


@pytest.mark.parametrize("layout", WHOLE)
def test_every_layout_of_a_batch_gives_the_same_numbers(layout: str, tmp_path: Path) -> None:
    batch = drawn()
    expected, found = (
        inspect_batch(batch),
        inspect_batch(read_batch(WHOLE[layout](batch, tmp_path))),
    )
    assert found.tokens == expected.tokens and found.holds == expected.holds
    assert found.metrics.keys() == expected.metrics.keys()
    for name, value in expected.metrics.items():
        assert found.metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-9), name
    assert np.allclose(found.by_layer, expected.by_layer)
    for own, theirs in zip(expected.pairs, found.pairs, strict=True):
        assert theirs.mean == pytest.approx(own.mean) and theirs.survival == own.survival


def test_prime_rl_s_exports_are_the_policy_and_the_engine(tmp_path: Path) -> None:
    batch = drawn()
    path = as_prime(batch, tmp_path)
    known = replace(batch, old_logprobs=None, routes=None, trainer_routes=None)
    for place in (path, path / "step_3"):
        found = inspect_batch(read_batch(place))
        expected = inspect_batch(known)
        assert found.source == "prime-rl" and found.holds == expected.holds
        assert found.metrics == pytest.approx(expected.metrics, rel=1e-5, abs=1e-9)
    one = inspect_batch(read_batch(path / "step_3" / "rank_1.jsonl"))
    assert one.sequences == B // 2


def prime_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("rows", [[0], [4], range(B // 2)])
def test_log_probs_that_are_null_throughout_a_row_are_no_numbers(rows: Any, tmp_path: Path) -> None:
    """prime-rl writes null for what is not finite, which may be all of a sequence."""
    path = as_prime(drawn(), tmp_path) / "step_3" / "rank_0.jsonl"
    exported = prime_rows(path)
    for n in rows:
        exported[n]["trainer_logprobs"] = [None] * (SP + T)
    path.write_text("\n".join(map(json.dumps, exported)))
    found = inspect_batch(read_batch(path))
    lost = int(drawn().mask[list(rows)].sum())
    assert found.not_finite == {"logprobs": lost}
    assert findings(found)[0].level == "wrong"


def test_numbers_that_a_tool_wrote_as_integers_cut_no_others(tmp_path: Path) -> None:
    path = as_prime(drawn(), tmp_path) / "step_3" / "rank_0.jsonl"
    expected = inspect_batch(read_batch(path)).metrics
    exported = prime_rows(path)
    for name in ("advantages", "trainer_logprobs", "inference_logprobs"):
        # Of prompt tokens, which count nowhere: a first row that holds integers alone.
        exported[0][name] = [0] * (SP + T)
    exported[0]["loss_mask"] = [False] * (SP + T)
    path.write_text("\n".join(map(json.dumps, exported[:1] + prime_rows(path))))
    assert inspect_batch(read_batch(path)).metrics == pytest.approx(expected)


def test_tokens_outside_prime_rl_s_rl_loss_are_left_out(tmp_path: Path) -> None:
    path = as_prime(drawn(), tmp_path) / "step_3" / "rank_0.jsonl"
    exported = prime_rows(path)
    whole = read_batch(path).mask
    for row in exported:
        row["rl_weights"] = [float(n % 2) for n in range(SP + T)]
    path.write_text("\n".join(map(json.dumps, exported)))
    odd = torch.arange(whole.shape[1]) % 2 == 1
    assert torch.equal(read_batch(path).mask, whole & odd)


def test_of_a_folder_of_batches_the_last_is_read(tmp_path: Path) -> None:
    for step, rows in ((9, B), (10, B - 2)):
        batch = drawn()
        names = ("mask", "logprobs", "old_logprobs", "rollout_logprobs", "routes")
        cut = {name: getattr(batch, name)[:rows] for name in names}
        write_batch(tmp_path / f"step_{step}.safetensors", RecordedBatch(source="verl", **cut))
    found = read_batch(tmp_path)
    assert len(found.mask) == B - 2
    assert found.notes == ("step_10.safetensors, the last of 2 batches in the folder",)


def test_layers_of_zeros_and_sequences_that_do_not_count_are_not_called_lost_or_written_over() -> (
    None
):
    """vLLM writes zeros for dense layers, and -1 where a sequence ends."""
    batch = drawn()
    assert batch.routes is not None
    dense = torch.zeros_like(batch.routes[:, :, :1])
    routes = torch.cat([dense, batch.routes], dim=2).masked_fill(~batch.mask[..., None, None], -1)
    mask = batch.mask.clone()
    mask[3] = False
    routes[3] = -1
    one = RecordedBatch(source="test", mask=mask, routes=routes)
    found = inspect_batch(one, num_experts=E)
    assert not [law for law in found.laws if law.passed is False]
    assert found.notes[0].startswith("layers [0] hold zeros alone: taken for dense layers")
    given = {"num_experts": E, "response": mask}
    laws = {law.check: law for law in check_trace(routes, **given)}
    assert [name for name, law in laws.items() if law.passed is False] == ["zeros"]
    assert "layers [0] are all zeros: dense layers" in laws["zeros"].reason


def test_a_repeated_token_excuses_a_repeated_row(tmp_path: Path) -> None:
    row = [[[e, (3 * e + layer) % 8 + 8] for layer in range(L)] for e in range(8)]
    tokens = [3, 1, 4, 2, *[6] * 20, 5, 0]
    routes = [row[token] for token in tokens[:-1]]
    choice = {"token_ids": tokens[4:], "routed_experts": routes}
    response = {"prompt_token_ids": tokens[:4], "choices": [choice]}
    (tmp_path / "r.json").write_text(json.dumps(response))
    batch = read_batch(tmp_path / "r.json")
    assert not [law for law in inspect_batch(batch, num_experts=E).laws if law.passed is False]
    without = inspect_batch(replace(batch, tokens=None), num_experts=E).laws
    assert "runs" in [law.check for law in without if law.passed is False]


def test_of_few_sequences_a_mean_is_not_called_wrong() -> None:
    spoiled = spoilt("temperature")
    names = ("mask", "logprobs", "old_logprobs", "rollout_logprobs")
    few = {name: getattr(spoiled, name)[:4] for name in names}
    words = said(RecordedBatch(source="test", **few))
    pattern = "the mean of trainer over engine is"
    assert not [one for one in words if one.startswith(f"wrong: {pattern}")]


def test_advantages_that_are_null_everywhere_are_absent(tmp_path: Path) -> None:
    path = as_prime(drawn(), tmp_path) / "step_3" / "rank_0.jsonl"
    exported = [row | {"advantages": [None] * (SP + T)} for row in prime_rows(path)]
    path.write_text("\n".join(map(json.dumps, exported)))
    found = inspect_batch(read_batch(path))
    assert "advantages" not in found.holds and found.not_finite == {}
    assert [note for note in found.notes if "advantages" in note] == [
        "advantages: null at every token, left out"
    ]


@pytest.mark.parametrize("name", ["sample_mask", "sample_loss_mask"])
def test_sequences_that_nemo_rl_leaves_out_are_left_out(name: str, tmp_path: Path) -> None:
    batch = drawn()
    path = as_nemo(batch, tmp_path)
    rows = prime_rows(path)
    for n, row in enumerate(rows):
        del row["sample_mask"]
        row[name] = [float(n != 2)]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert read_batch(path).mask.sum() == batch.mask.sum() - batch.mask[2].sum()


def test_fills_of_expert_0_are_lost_rows_where_tokens_are_and_nothing_elsewhere(
    tmp_path: Path,
) -> None:
    batch = drawn()
    path = as_verl(batch, tmp_path)
    arrays = {n: v for n, v in load_file(path).items() if n != "trainer_routed_experts"}
    width = SP - 1
    arrays["routed_experts"][:, width : width + T][~batch.mask] = 0
    save_file(arrays, path)
    found = inspect_batch(read_batch(path), num_experts=E)
    assert found.metrics["replay/coverage"] == 1
    assert not [law for law in found.laws if law.passed is False]
    arrays["routed_experts"][0, width + 1 : width + 4] = 0
    save_file(arrays, path)
    found = inspect_batch(read_batch(path), num_experts=E)
    assert found.metrics["replay/coverage"] == pytest.approx(1 - 3 / int(batch.mask.sum()))
    assert [law.check for law in found.laws if law.passed is False] == ["lost"]


@pytest.mark.parametrize("lacking", [0, 1], ids=["filler-row", "as-fed"])
def test_responses_of_an_engine_are_its_routes(lacking: int, tmp_path: Path) -> None:
    """The token that was never fed may have a row or none: it is a response token all the same."""
    batch = drawn()
    assert batch.routes is not None
    lengths = batch.mask.sum(1).tolist()
    read = where_read(batch.routes)
    with (tmp_path / "responses.jsonl").open("w") as file:
        for i, length in enumerate(lengths):
            rows = read[i, : SP + length - lacking].tolist()
            choice = {"token_ids": [1] * length, "routed_experts": rows}
            response = {"prompt_token_ids": [1] * SP, "choices": [choice]}
            file.write(json.dumps(response) + "\n")
    found = inspect_batch(read_batch(tmp_path / "responses.jsonl"))
    assert found.source == "vLLM" and found.holds == ["routes"] and found.tokens == sum(lengths)
    assert found.metrics == {"replay/coverage": 1}


def test_numbers_are_those_of_formulas() -> None:
    batch = drawn()
    found = inspect_batch(batch)
    tokens = batch.mask.nonzero().tolist()

    def logs(a: str, b: str) -> list[float]:
        top, bottom = getattr(batch, a), getattr(batch, b)
        return [float(top[i, t].double() - bottom[i, t].double()) for i, t in tokens]

    x = logs("old_logprobs", "rollout_logprobs")
    k3 = sum(math.exp(v) - 1 - v for v in x) / len(x)
    assert found.metrics["mismatch/kl_k3"] == pytest.approx(k3)
    pair = found.pairs[0]
    assert pair.mean == pytest.approx(sum(map(math.exp, x)) / len(x))
    assert dict(pair.extreme)[1.2] == pytest.approx(sum(abs(v) > math.log(1.2) for v in x) / len(x))
    differ = sum(t % 5 == 0 for _, t in tokens) / len(tokens)
    assert found.metrics["mismatch/router_disagreement"] == pytest.approx(differ / L)
    assert [routers for _, routers in found.by_layer] == pytest.approx([0, differ, 0])
    assert found.metrics["replay/coverage"] == 1
    branches = [v for k, v in found.metrics.items() if re.fullmatch(r"branch/\w+tive_[a-z]+", k)]
    assert sum(branches) == pytest.approx(1)


def said(batch: RecordedBatch, **options: Any) -> list[str]:
    return [f"{level}: {words}" for level, words in findings(inspect_batch(batch, **options))]


def test_an_honest_batch_has_nothing_wrong() -> None:
    assert not [words for words in said(drawn(), num_experts=E) if words.startswith("wrong")]


def spoilt(name: str) -> RecordedBatch:
    """A batch with one thing wrong."""
    batch = drawn()
    assert batch.rollout_logprobs is not None and batch.routes is not None
    match name:
        case "temperature":  # the engine sampled at 2 and recorded the log-probs of 1, or so
            return replace(batch, rollout_logprobs=2 * batch.rollout_logprobs)
        case "nan":
            values = batch.rollout_logprobs.clone()
            values[0, 0] = torch.nan
            return replace(batch, rollout_logprobs=values)
        case "old weights":
            rng = torch.Generator().manual_seed(1)
            noise = torch.randn(B, T, generator=rng)
            return replace(batch, old_logprobs=batch.rollout_logprobs - noise.abs())
        case "same":
            return replace(batch, old_logprobs=batch.rollout_logprobs.clone())
        case "zeros":  # rows beyond what was captured are filled with 0 (verl's agent loop)
            routes = batch.routes.clone()
            routes[0, 3:] = 0
            return replace(batch, routes=routes)
        case "lost":
            routes = batch.routes.clone()
            routes[0, 2:4] = -1
            return replace(batch, routes=routes)
        case "beyond":
            return replace(batch, routes=(batch.routes + 8).to(torch.int16))
        case "shifted":
            return replace(batch, routes=batch.routes.roll(1, dims=1))
        case "versions":
            versions = torch.zeros(B, T, dtype=torch.int64)
            versions[: B // 2, 4:] = 1
            return replace(batch, versions=versions)
    raise KeyError(name)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("temperature", "wrong: the mean of trainer over engine is .*standard errors from 1"),
        ("nan", "wrong: rollout_logprobs is NaN, inf or null at 1 of"),
        ("old weights", "wrong: the mean of trainer over engine is 0"),
        ("same", "look: KL .* are the same numbers"),
        ("zeros", "wrong: routes, law "),
        ("lost", "look: .* of response .token, layer. pairs have no record"),
        ("beyond", "wrong: routes, law ids: an id of 23 for 16 experts"),
        ("shifted", "wrong: the engine's routes fit the trainer's one position earlier"),
        ("versions", "look: 50.0% of sequences were sampled by more than one version"),
    ],
)
def test_what_is_wrong_is_said(name: str, pattern: str) -> None:
    own, all_said = said(drawn(), num_experts=E), said(spoilt(name), num_experts=E)
    assert any(re.match(pattern, words) for words in all_said), all_said
    assert not any(re.match(pattern, words) for words in own)


def test_text_that_repeats_its_tokens_is_not_called_shifted() -> None:
    """Its neighbours go to the same experts, so that a shifted record fits as well."""
    rng = torch.Generator().manual_seed(0)
    for share in (0.005, 0.05, 0.5):
        one = torch.rand(B, 1, L, E, generator=rng).topk(K, dim=-1).indices.to(torch.int16)
        routes, trainer = one.repeat(1, T, 1, 1), one.repeat(1, T, 1, 1)
        for record in (routes, trainer):
            moved = torch.rand(B, T, L, generator=rng) < share
            record[moved] = (record[moved] + 1) % E
        batch = replace(drawn(), routes=routes, trainer_routes=trainer)
        assert inspect_batch(batch).best_shift == 0
    two = replace(
        drawn(),
        **{name: getattr(drawn(), name)[:, :2] for name in
           ("mask", "logprobs", "old_logprobs", "rollout_logprobs", "advantages")},
        routes=drawn().trainer_routes[:, 1:3], trainer_routes=drawn().trainer_routes[:, :2],
    )  # fmt: skip
    assert inspect_batch(two).best_shift == 1


def test_ratios_over_the_sampling_policy_stay_below_the_bound_and_others_need_not() -> None:
    """Tokens that a recomputed pass liked too little have ratios that nothing bounds."""
    batch = drawn()
    assert batch.rollout_logprobs is not None
    unlucky = batch.rollout_logprobs.clone()
    unlucky[:, ::4] -= 6
    found = inspect_batch(replace(batch, old_logprobs=unlucky))
    by_name = {(p.numerator, p.denominator): p for p in found.pairs}
    over_engine = by_name["logprobs", "rollout_logprobs"]
    over_old = by_name["logprobs", "old_logprobs"]
    assert all(share <= 1 / t for t, share in over_engine.survival)
    assert over_old.mean > 10 > 2 > over_engine.mean
    words = said(replace(batch, old_logprobs=unlucky))
    assert any("recomputed denominator" in sentence for sentence in words)


def test_the_command_writes_the_page_and_its_exit_code_says_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, code in (("versions", 0), ("beyond", 1)):
        path = as_ours(spoilt(name), tmp_path)
        out = tmp_path / name
        given = ["inspect", str(path), "--out", str(out), "--num-experts", str(E)]
        assert main(given) == code
        said, page = capsys.readouterr().out, (out / "index.html").read_text()
        for finding in json.loads((out / "inspection.json").read_text())["findings"]:
            assert finding["words"] in said
            assert escape(finding["words"]).replace("&#x27;", "&#39;") in page
        assert {p.stem for p in (out / "figures").glob("*.svg")} == {
            *("scatter", "tails", "branches", "layers")
        }
        assert all(f">{law}<" in page for law in TRACE_LAWS)


def test_a_batch_is_drawn_beside_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the names of their folders; what cannot be drawn is refused before anything is written."""
    path = as_ours(spoilt("versions"), tmp_path)
    given = ["inspect", str(path), "--num-experts", str(E), "--out"]
    for name in ("first", "second"):
        assert main([*given, str(tmp_path / name)]) == 0
    beside = ["--beside", str(tmp_path / "first"), str(tmp_path / "second")]
    assert main([*given, str(tmp_path / "third"), *beside]) == 0
    drawn = (tmp_path / "third" / "figures" / "beside.svg").read_text()
    assert all(f">{name}<" in drawn for name in ("first", "second", "third"))
    (tmp_path / "no").mkdir()
    (tmp_path / "no" / "inspection.json").write_text('{"schema": 1, "scatter": []}')
    capsys.readouterr()
    for out, others, words in (
        ("fourth", ["no"], "no inspection of engine and trainer"),
        ("fourth", ["nowhere"], "no inspection of engine and trainer"),
        ("first", ["first"], "names differ"),
    ):
        folders = [str(tmp_path / other) for other in others]
        assert main([*given, str(tmp_path / out), "--beside", *folders]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "fourth").exists()
    assert main(["inspect", str(tmp_path / "third")]) == 2
    assert "give this folder to --beside" in capsys.readouterr().err


def test_trl_s_log_is_read_by_our_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        {"step": n, "reward": n / 20, "clip_ratio/region_mean": 0.1, "branch/negative_above": 0.3}
        | {
            "branch/largest_token": 0.2,
            "replay/coverage": 0.75,
            "kl_k3": 2e-3,
            "epoch": 0.1,
            "some/other": 1.0,
        }
        for n in range(1, 21)
    ]
    for step, history in ((5, lines[:5]), (20, [*lines, {"step": 20, "train_runtime": 9.0}])):
        folder = tmp_path / "out" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    page = tmp_path / "page"
    assert main(["inspect", str(tmp_path / "out"), "--out", str(page)]) == 0
    said = capsys.readouterr().out
    assert "TRL, 21 log lines" in said and "25.00% of response" in said and "30.0%" in said
    found = json.loads((page / "inspection.json").read_text())
    assert found["metrics"]["reward"] == pytest.approx(sum(range(11, 21)) / 200)
    assert found["metrics"]["clip_ratio/region"] == pytest.approx(0.1)
    assert found["metrics"]["kl_k3"] == pytest.approx(2e-3)
    assert "some/other" not in found["metrics"] and len(found["history"]["reward"]) == 20
    assert (page / "figures" / "history.png").is_file()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("no.npz", None, "No such file"),
        ("a.csv", "1,2", "a batch is a file"),
        ("a.jsonl", "{", "line 1: not JSON"),
        ("a.jsonl", '{"inference_logprobs": [0.0]}', "row 1: no mask of response tokens"),
        ("a.jsonl", '{"inference_logprobs": [0.0, 0.0], "loss_mask": [true]}', "unequal lengths"),
        ("a.jsonl", '{"inference_logprobs": [0, 0], "loss_mask": [false, false]}', "no response"),
        (
            "a.jsonl",
            '{"inference_logprobs": "x", "loss_mask": [true]}',
            "row 1: inference_logprobs",
        ),
        ("a.jsonl", "", "no rows"),
        ("a.jsonl", "3", "a.jsonl"),
        ("a.safetensors", "broken", "a.safetensors"),
        ("a.npz", "PK\x03\x04 broken", "a.npz"),
        ("a.npz", "text", "no arrays of numbers"),
    ],
)
def test_a_file_that_is_no_batch_gets_one_line(
    name: str, content: str | None, words: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=words) as error:
        read_batch(tmp_path / name)
    assert str(error.value).startswith(str(tmp_path / name)) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mask": np.ones(4)}, r"mask: shape \[4\]; record 2 axes"),
        ({"mask": np.full((2, 4), np.nan)}, "mask: NaN"),
        ({"routes": np.ones((2, 4), np.int64)}, r"routes: shape \[2, 4\]; record 4 axes"),
        ({"routes": np.full((2, 4, 1, 2), 70_000)}, "routes: ids from 70000 to 70000"),
        ({"routes": np.full((2, 4, 1, 2), 65_535, np.uint16)}, "ids from 65535 .* a signed type"),
        ({"routes": np.full((2, 4, 1, 2), 5.5)}, "routes: torch.float64; record expert ids as int"),
        ({"advantages": np.ones(3)}, "advantages: 3, the mask has 2 sequences"),
    ],
)
def test_arrays_of_another_form_get_one_line(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    arrays = {"mask": np.ones((2, 4)), "old_logprobs": np.zeros((2, 4)), "uid": np.array(["a"])}
    np.savez(tmp_path / "a.npz", **arrays | changes)
    with pytest.raises(ConfigError, match=words) as error:
        read_batch(tmp_path / "a.npz")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("history", ["null", "[1]", '[{"step": null, "reward": 1.0}]'])
def test_a_log_of_another_form_gets_one_line(history: str, tmp_path: Path) -> None:
    state = tmp_path / "trainer_state.json"
    state.write_text(f'{{"log_history": {history}}}')
    try:
        assert inspect_log(state).metrics == {"reward": 1.0}
    except ConfigError as error:
        assert "no log of TRL" in str(error)
