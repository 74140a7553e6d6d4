"""The audit of checkpoints of several families: what must be equal is, what is moved is seen."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_policy import ALPHABET

from moe_rl.audit import Audit, Sample, audit_model
from moe_rl.audit.difference import Difference, Distance
from moe_rl.audit.verdict import shape_verdict, verdict
from moe_rl.commands.cli import main
from moe_rl.config import AuditPrecision, ModelConfig
from moe_rl.metrics.published import DENSE_KL
from moe_rl.policy.build import build_policy
from moe_rl.policy.tokenizer import tokenizer_of
from moe_rl.replay_check.families import build_family
from moe_rl.routing import find_routers, record_routing, replay_routing
from moe_rl.traces.files import Trace, write_trace

# A plain router, a correction bias with groups, biased experts, attention with a recurrent state.
FAMILIES = ("olmoe", "deepseek_v3", "gpt_oss", "qwen3_next")
PROMPTS = ["1234=", "98765432=", "5="]
SAMPLE = Sample(group_size=2, max_tokens=6, sequences_per_pass=4)
SHAPES = {"padding in front", "padding behind", "one sequence at a time", "sampled token by token"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    for family in FAMILIES:
        model: Any = build_family(family, max_position_embeddings=64)
        model.save_pretrained(folder / family)
        tokenizer_of(ALPHABET).save_pretrained(folder / family)
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def audited(request: pytest.FixtureRequest, folder: Path) -> Audit:
    return audit(folder / request.param, ("int4", "bf16"))


def config_of(path: Path) -> ModelConfig:
    return ModelConfig(checkpoint=str(path), device="cpu")


def audit(path: Path, precisions: tuple[AuditPrecision, ...] = (), **options: Any) -> Audit:
    return audit_model(config_of(path), PROMPTS, SAMPLE, precisions=precisions, **options)


def test_what_differs_in_the_order_of_sums_alone_moves_next_to_nothing(audited: Audit) -> None:
    kinds = ("again", "shape", "experts")
    rows = {row.name: row.difference for row in audited.rows if row.kind in kinds}
    assert rows["the same pass again"].live.largest == 0
    assert set(rows) >= SHAPES | {"the same pass again"}
    for name, difference in rows.items():
        assert difference.live.largest < 1e-3, name
        assert difference.router_disagreement <= 0.02, name
        assert difference.tokens == audited.tokens and difference.not_finite == 0
    missing = {missing.name for missing in audited.missing}
    assert ("a key-value cache" in rows) != ("a key-value cache" in missing)
    by_scores = "DeepseekV3" in audited.model
    assert audited.margin_unit == ("scores" if by_scores else "logits")


def test_rounding_moves_routes_and_replay_takes_that_part_away(audited: Audit) -> None:
    rows = {row.name: row.difference for row in audited.rows}
    for name in ("int4 weights", "bf16"):
        moved = rows[name]
        assert moved.live.kl_k3 > 0
        if moved.router_disagreement > 0:
            assert moved.replayed is not None and moved.replayed.kl_k3 > 0
    coarse, fine = rows["int4 weights"], rows["bf16"]
    assert coarse.router_disagreement > max(fine.router_disagreement, 0.01)
    assert coarse.live.kl_k3 > fine.live.kl_k3
    assert len(coarse.flips_by_margin) == 10
    near, far = coarse.flips_by_margin[0][1], coarse.flips_by_margin[-1][1]
    assert near > far


def test_a_replayed_reading_takes_the_reference_s_routes(folder: Path) -> None:
    """With weights that equal the reference's, routes are all that a trace can change."""
    path = folder / "olmoe"
    policy = build_policy(config_of(path), "", fuse=False)
    tokens = torch.tensor([[4, 5, 6, 7, 8, 9], [5, 3, 9, 2, 2, 7]])
    with record_routing(policy.model) as seen:
        policy.read_whole(tokens, torch.ones_like(tokens, dtype=torch.bool))
    own = seen.routed_experts
    foreign = (own + 3) % 8
    for routes, differ in ((own, 0.0), (foreign, 1.0)):
        trace = Trace(routed_experts=routes, source="test", tokens=tokens)
        found = audit(path, trace=("t.npz", trace)).rows[-1]
        assert found.name == "trace t.npz" and found.kind == "trace"
        assert found.difference.tokens == 10
        assert (found.difference.live.kl_k3 > 1e-6) == bool(differ)
        assert (found.difference.router_disagreement > 0.5) == bool(differ)


def test_the_log_probs_of_a_trace_are_an_engine_s(folder: Path) -> None:
    """Its KL is that of the responses' own log-probs, and what replay leaves is not routing."""
    path = folder / "olmoe"
    policy = build_policy(config_of(path), "", fuse=False)
    tokens = torch.tensor([[4, 5, 6, 7, 8, 9], [5, 3, 9, 2, 2, 7]])
    with record_routing(policy.model) as seen:
        logits = policy.model(tokens).logits
    own = seen.routed_experts
    foreign = (own + 3) % 8
    with torch.no_grad(), replay_routing(policy.model, foreign):
        moved = policy.model(tokens).logits
    for routes, said, removed in ((own, logits, None), (foreign, moved, 1.0)):
        logprobs = said.detach().log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
        logprobs = torch.nn.functional.pad(logprobs, (0, 1), value=math.nan)
        trace = Trace(routed_experts=routes, source="test", tokens=tokens, logprobs=logprobs)
        row = audit(path, trace=("t.json", trace)).rows
        found = next(one for one in row if one.name == "trace t.json")
        assert found.kind == "engine" and found.difference.not_finite == 0
        if removed is None:
            assert found.difference.live.kl_k3 < 1e-10
        else:
            assert found.difference.live.kl_k3 > 1e-6
            assert found.difference.removed == pytest.approx(removed, abs=1e-4)


def test_a_trace_of_another_model_is_refused_before_anything_is_sampled(folder: Path) -> None:
    routes = torch.zeros(1, 4, 2, 2, dtype=torch.int16)
    routes[..., 1] = 1
    tokens = torch.tensor([[2, 3, 4, 5]])
    trace = Trace(routed_experts=routes, source="test", tokens=tokens)
    for wrong, words in (
        (replace(trace, tokens=None), "no token ids"),
        (replace(trace, routed_experts=routes[:, :, :1]), "1 layers, but the model has 2 MoE"),
        (replace(trace, routed_experts=routes[..., :1]), "1 experts a token, .* routers choose 2"),
        (replace(trace, tokens=torch.tensor([[2, -5, 4, 5]])), "a negative token id"),
        (replace(trace, tokens=torch.tensor([[2, -1, 4, 5]])), "a negative token id"),
        (replace(trace, tokens=tokens + 500), "token id 505, the model embeds"),
        (replace(trace, routed_experts=routes - 2), "no response token has a record"),
        (replace(trace, routed_experts=routes + 14), "expert id 15, the model has 8"),
        (
            replace(trace, routed_experts=routes.repeat(1, 20, 1, 1), tokens=tokens.repeat(1, 20)),
            "80 tokens, the model's context is 64",
        ),
    ):
        with pytest.raises(ValueError, match=f"trace='t.npz': .*{words}"):
            audit(folder / "olmoe", trace=("t.npz", wrong))


def test_verdicts_name_the_case() -> None:
    def difference(kl: float, replayed: float | None, routers: float) -> Difference:
        def distance(value: float) -> Distance:
            return Distance(kl_k1=value, kl_k3=value, kl_k3_error=0.0, extreme_2=0.0, largest=1.0)

        return Difference(
            tokens=9, not_finite=0.0, churn=routers / 2, router_disagreement=routers,
            token_disagreement=routers, live=distance(kl),
            replayed=None if replayed is None else distance(replayed),
            routers_by_layer=[routers], routers_by_position=[(0, 1, routers)], flips_by_margin=[],
        )  # fmt: skip

    needed = verdict("bf16", "numerics", difference(2e-3, 4e-5, 0.09))
    assert re.search(r"replay needed: 9\.0% of routers differ, KL 0\.002 .* removes 98%", needed)
    assert "not needed" in verdict("bf16", "numerics", difference(DENSE_KL / 2, 1e-5, 0.09))
    assert "does not mend" in verdict("fp8", "numerics", difference(2e-3, 1.9e-3, 0.09))
    assert "nothing to replay" in verdict("fp8", "numerics", difference(2e-6, None, 0.0))
    left = verdict("int4", "numerics", difference(0.9, 0.2, 0.3))
    assert "removes 78% and leaves 0.2" in left
    assert "not routing" in verdict("fp8", "numerics", difference(0.5, None, 0.0))
    broken = replace(difference(2e-3, 4e-5, 0.09), not_finite=1.0)
    assert "does not run" in verdict("fp16", "numerics", broken)
    near = difference(1.7 * DENSE_KL, 1e-5, 0.01)
    near = replace(near, live=replace(near.live, kl_k3_error=0.5 * DENSE_KL))
    assert "not settled: 1.0% of routers" in verdict("fp16", "numerics", near)
    assert "replay needed" in verdict(
        "fp16", "numerics", replace(near, live=replace(near.live, kl_k3_error=0.2 * DENSE_KL))
    )
    alone = replace(near, live=replace(near.live, kl_k3_error=math.nan))
    assert "not settled: 1.0% of routers" in verdict("fp16", "numerics", alone)
    shapes = [("experts eager", difference(2e-3, 2e-4, 0.04)), ("b", difference(1e-5, None, 0.0))]
    said = shape_verdict(shapes, "Experts backends")
    assert "more than the 0.00064" in said and "replay removes 90% of it" in said
    assert "more than" not in shape_verdict(shapes[1:], "Experts backends")


def test_an_engine_that_fails_is_told_and_the_rest_is_measured(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def sample(self, request: object) -> None:
            raise ValueError("5.72 GiB of key-value cache are needed")

    monkeypatch.setattr("moe_rl.audit.audit.make_engine", lambda *given: Broken())
    found = audit(folder / "olmoe", engine="cached")
    assert ("engine cached float32", "5.72 GiB of key-value cache are needed") in found.missing
    assert {row.name for row in found.rows} >= SHAPES


def test_a_trace_may_hold_every_decoder_layer(folder: Path, tmp_path: Path) -> None:
    """SGLang, and vLLM in some versions, write a row of each; the dense ones have no router."""
    whole_moe = build_policy(config_of(folder / "deepseek_v3"), "", fuse=False)
    whole_moe.model.config.first_k_dense_replace = 1
    model = type(whole_moe.model)(whole_moe.model.config)
    for part in (model, whole_moe.tokenizer):
        part.save_pretrained(path := tmp_path / "dense_first")
    policy = build_policy(config_of(path), "", fuse=False)
    tokens = torch.tensor([[4, 5, 6, 7, 8, 9]])
    with torch.no_grad(), record_routing(policy.model) as seen:
        policy.read_whole(tokens, torch.ones_like(tokens, dtype=torch.bool))
    own = seen.routed_experts
    layers = [tap.decoder_layer for tap in find_routers(policy.model)]
    total = policy.model.config.num_hidden_layers
    assert len(layers) < total
    whole = torch.zeros(*own.shape[:2], total, own.shape[3], dtype=torch.int16)
    whole[:, :, layers] = own
    for routes in (own, whole):
        trace = Trace(routed_experts=routes, source="test", tokens=tokens)
        row = audit(path, trace=("t.npz", trace)).rows[-1]
        assert row.kind == "trace" and row.difference.router_disagreement == 0


def test_the_command_prints_verdicts_and_writes_the_page(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"question": p}) for p in PROMPTS))
    out = tmp_path / "audit"
    given = ["audit", str(folder / "olmoe"), "--prompts", str(prompts), "--out", str(out)]
    given += ["--max-tokens", "6", "--device", "cpu", "--precisions", "bf16", "int4"]
    assert main(given) == 0
    said = capsys.readouterr().out
    found = json.loads((out / "audit.json").read_text())
    page = (out / "index.html").read_text()
    assert found["prompts"] == len(PROMPTS)
    for sentence in found["verdicts"]:
        assert sentence in said
        assert sentence.split(":")[0] in page
    for row in found["rows"]:
        assert row["name"] in said and row["name"].replace("'", "&#39;") in page
    assert sorted(p.stem for p in (out / "figures").glob("*.png")) == ["kl", "margins", "routers"]
    assert "<script" not in page
    other = [word.replace("olmoe", "gpt_oss") for word in given]
    assert main(other) == 2
    assert "olmoe; give another folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--num-prompts", "0"], "num_prompts=0: give 1 or more"),
        (["--temperature", "0"], "temperature=0"),
        (["--prompts", "missing.jsonl"], r"prompts='missing.jsonl': cannot be read"),
        (["--trace", "missing.npz"], "missing.npz"),
    ],
)
def test_bad_input_gets_one_line_before_the_model_is_loaded(
    options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["audit", "nowhere", "--prompts", "running_sum", "--out", str(tmp_path / "out")]
    assert main([*given, *options]) == 2
    said = capsys.readouterr().err
    assert re.search(words, said) and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_trace_file_is_read(folder: Path, tmp_path: Path) -> None:
    write_trace(tmp_path / "t.safetensors", torch.zeros(1, 3, 2, 2, dtype=torch.int16))
    given = ["audit", str(folder / "olmoe"), "--prompts", "running_sum"]
    assert main([*given, "--trace", str(tmp_path / "t.safetensors")]) == 2
