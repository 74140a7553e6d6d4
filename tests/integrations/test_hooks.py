"""slime's and prime-rl's hooks, called as they call them, on their layouts rebuilt by hand."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_rl.integrations import prime_rl, slime
from moe_rl.losses import ALGORITHMS, make_inputs
from moe_rl.metrics.branches import branch_shares
from moe_rl.metrics.ratios import mismatch_statistics, ratio_statistics
from moe_rl.recorded import read_batch

LENGTHS, PROMPT, L, K, E = (5, 9, 3, 7), 4, 3, 2, 16


def sequences(seed: int = 0) -> list[dict[str, Tensor]]:
    rng = torch.Generator().manual_seed(seed)
    return [
        {
            "engine": -3 * torch.rand(length, generator=rng),
            "trainer": -3 * torch.rand(length, generator=rng),
            "mask": (torch.rand(length, generator=rng) > 0.2).int(),
            "advantages": torch.randn(1, generator=rng).expand(length),
        }
        for length in LENGTHS
    ]


def padded(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def test_slime_gets_its_loss_and_masks_back_and_our_numbers_beside() -> None:
    rows = sequences()
    loss = torch.randn(sum(LENGTHS), requires_grad=True)
    masks = [row["mask"] for row in rows]
    value, kept, metrics = slime.measure(
        SimpleNamespace(use_tis=True),
        pg_loss=loss,
        train_log_probs=[row["trainer"] for row in rows],
        rollout_log_probs=[row["engine"] for row in rows],
        loss_masks=masks,
        total_lengths=[PROMPT + length for length in LENGTHS],
        response_lengths=list(LENGTHS),
    )
    assert value is loss and kept is masks
    expected = mismatch_statistics(
        padded([row["trainer"] for row in rows]),
        padded([row["engine"] for row in rows]),
        padded([row["mask"] for row in rows]).bool(),
    )
    for name, number in expected.items():
        tensor = metrics[f"moe_rl/{name}"]
        # slime takes means over tokens, of any grouping.
        assert tensor.shape == loss.shape and not tensor.requires_grad
        assert tensor.mean() == pytest.approx(number, rel=1e-5)
    assert {"moe_rl/rollout_ratio/mean", "moe_rl/rollout_ratio/token_ess"} <= set(metrics)


def test_slime_gets_every_name_of_every_micro_batch() -> None:
    """It adds them up by name over micro-batches and ranks. Under context parallelism log-probs are
    a rank's part, which is NaN; padding adds 0."""
    rows, loss = sequences(), torch.randn(sum(LENGTHS))
    given = {"trainer": "train_log_probs", "engine": "rollout_log_probs", "mask": "loss_masks"}
    whole = {theirs: [row[ours] for row in rows] for ours, theirs in given.items()}
    names = set(slime.measure(SimpleNamespace(), pg_loss=loss, **whole)[2])
    for spoil in ("parts", "padding"):
        masks = [row["mask"] if spoil == "parts" else 0 * row["mask"] for row in rows]
        cut = 1 if spoil == "parts" else 0
        value, kept, metrics = slime.measure(
            SimpleNamespace(),
            pg_loss=loss,
            train_log_probs=[row["trainer"][cut:] for row in rows],
            rollout_log_probs=[row["engine"][cut:] for row in rows],
            loss_masks=masks,
        )
        assert value is loss and kept is masks and set(metrics) == names
        for values in metrics.values():
            assert values.shape == loss.shape
            assert (values.isnan() if spoil == "parts" else values == 0).all()


@dataclass
class Sample:
    """What slime's `Sample` has of what is read here."""

    tokens: list[int]
    response_length: int
    loss_mask: list[int] | None = None
    rollout_log_probs: list[float] | None = None
    rollout_routed_experts: Any = None
    weight_versions: list[str] = field(default_factory=list)


def samples(**changes: Any) -> list[Sample]:
    rng = torch.Generator().manual_seed(1)
    made = []
    for row, length in zip(sequences(), LENGTHS, strict=True):
        draws = torch.rand(PROMPT + length - 1, L, E, generator=rng)
        made.append(
            Sample(
                tokens=[7] * (PROMPT + length),
                response_length=length,
                loss_mask=[1] * length,
                rollout_log_probs=row["engine"].tolist(),
                rollout_routed_experts=draws.topk(K, dim=-1).indices.to(torch.int32),
                weight_versions=["3"],
            )
        )
    for name, value in changes.items():
        setattr(made[1], name, value)
    return made


def logged(made: list[Sample]) -> dict[str, Any]:
    metrics: dict[str, Any] = {"own": 1.0}
    assert slime.log_rollout(5, SimpleNamespace(), made, metrics, 1.5) is False
    return metrics


def test_a_whole_record_of_slime_is_covered() -> None:
    metrics = logged(samples())
    assert metrics["own"] == 1.0
    assert metrics["moe_rl/replay/coverage"] == 1 and metrics["moe_rl/replay/broken_laws"] == 0
    assert metrics["moe_rl/rollout/mixed_versions"] == 0


def test_rows_that_were_filled_with_expert_0_count_as_lost() -> None:
    made = samples()
    made[1].rollout_routed_experts[PROMPT + 2 :] = 0
    lost = LENGTHS[1] - 3
    assert logged(made)["moe_rl/replay/coverage"] == pytest.approx(1 - lost / sum(LENGTHS))
    short = samples(rollout_routed_experts=samples()[1].rollout_routed_experts[: PROMPT + 2])
    assert logged(short)["moe_rl/replay/coverage"] == pytest.approx(1 - lost / sum(LENGTHS))


def test_an_expert_chosen_twice_is_a_broken_law(caplog: pytest.LogCaptureFixture) -> None:
    made = samples()
    made[2].rollout_routed_experts[PROMPT, 1] = 5
    assert logged(made)["moe_rl/replay/broken_laws"] == 1
    assert "law distinct" in caplog.text


def test_sequences_of_several_weights_are_counted() -> None:
    batch = slime.batch_of(samples(weight_versions=["10", "9"]))
    assert batch is not None and batch.versions is not None
    assert batch.versions[1, 0] < batch.versions[1, 1]
    assert logged(samples(weight_versions=["2", "3"]))["moe_rl/rollout/mixed_versions"] == 0.25


def test_a_rollout_of_slime_is_written_for_inspect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(slime.RECORD, str(tmp_path / "batches"))
    made = samples()
    logged(made)
    batch = read_batch(tmp_path / "batches" / "rollout_5.safetensors")
    assert batch.source == "slime" and batch.mask.sum() == sum(LENGTHS)
    assert batch.routes is not None
    expected = made[1].rollout_routed_experts[PROMPT - 1 : PROMPT - 1 + LENGTHS[1]]
    assert torch.equal(batch.routes[1], expected.to(torch.int16))


def test_without_a_record_slime_logs_as_ever() -> None:
    bare = [Sample(tokens=[1] * 6, response_length=2)]
    assert logged(bare) == {"own": 1.0}
    assert slime.log_rollout(0, SimpleNamespace(), [], None, 0.0) is False


@dataclass
class LossInputs:
    """prime-rl's, September 2026."""

    trainer_logprobs: Tensor
    inference_logprobs: Tensor
    ref_logprobs: Tensor | None
    advantages: Tensor
    loss_mask: Tensor
    loss_weights: Tensor | None = None


@dataclass
class LossOutputs:
    loss: Tensor
    metrics: dict[str, Tensor]


@pytest.fixture
def prime(monkeypatch: pytest.MonkeyPatch) -> None:
    path = "prime_rl.trainer.rl.loss"
    for end in range(1, path.count(".") + 2):
        name = ".".join(path.split(".")[:end])
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[path].LossOutputs = LossOutputs  # type: ignore[attr-defined]


def inputs_of(row: dict[str, Tensor]) -> LossInputs:
    return LossInputs(
        trainer_logprobs=row["trainer"].double().requires_grad_(),
        inference_logprobs=row["engine"].double(),
        ref_logprobs=None,
        advantages=row["advantages"].double(),
        loss_mask=row["mask"].bool(),
    )


@pytest.mark.parametrize("name", [n for n in ALGORITHMS if n not in prime_rl.NEEDS_MORE])
def test_prime_rl_gets_the_sum_of_our_loss_and_its_metrics(prime: None, name: str) -> None:
    for row in sequences():
        inputs = inputs_of(row)
        found = prime_rl.loss(inputs, algorithm=name)
        new, engine = inputs.trainer_logprobs[None], inputs.inference_logprobs[None]
        mask, advantages = inputs.loss_mask[None], inputs.advantages[None]
        given = make_inputs(new, engine, advantages, mask, rollout_logprobs=engine)
        expected = ALGORITHMS[name].loss(given)[mask].sum()
        torch.testing.assert_close(found.loss, expected)
        own, theirs = (
            torch.autograd.grad(value, inputs.trainer_logprobs, retain_graph=True)[0]
            for value in (found.loss, expected)
        )
        torch.testing.assert_close(own, theirs)
        log_ratio = (new - engine).detach()
        numbers = {
            **ratio_statistics(new.detach(), engine, mask),
            **branch_shares(theirs[None], log_ratio, advantages, mask, torch.zeros_like(mask)),
        }
        for metric, value in numbers.items():
            if not metric.endswith("_flipped"):
                assert found.metrics[f"moe_rl/{metric}"].item() == pytest.approx(value, rel=1e-5)


def test_a_sequence_of_padding_has_no_metrics(prime: None) -> None:
    inputs = inputs_of(sequences()[0])
    inputs.loss_mask = torch.zeros_like(inputs.loss_mask)
    found = prime_rl.loss(inputs)
    assert found.metrics == {} and found.loss == 0


def test_prime_rl_s_weights_scale_tokens(prime: None) -> None:
    inputs = inputs_of(sequences()[1])
    plain = prime_rl.loss(inputs).loss
    inputs.loss_weights = torch.full_like(inputs.advantages, 3.0)
    torch.testing.assert_close(prime_rl.loss(inputs).loss, 3 * plain)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("ppo", {}, "algorithm='ppo': needs values"),
        ("rspo", {}, "algorithm='rspo': needs router logits"),
        ("tis", {}, "algorithm='tis': needs log-probs of a trainer pass of its own"),
        ("gsop", {}, "algorithm='gsop': unknown"),
        ("grpo", {"clip": 0.2}, "clip=0.2: no option of grpo"),
        ("grpo", {"clip_high": "x"}, "clip_high='x': no number"),
    ],
)
def test_what_prime_rl_cannot_have_is_refused(
    prime: None, name: str, options: dict[str, float], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        prime_rl.loss(inputs_of(sequences()[0]), algorithm=name, **options)


def test_a_rollout_that_cannot_be_measured_does_not_stop_slime(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for sample, words in (
        (Sample([1, 2, 3], 2, [0, 0], [-1.0, -2.0]), "no response token"),
        (Sample([1, 2, 3], 2, [1, 1], [-1.0]), "1 log-probs of 2 response tokens"),
    ):
        metrics: dict[str, Any] = {}
        assert slime.log_rollout(4, None, [sample], metrics, 0.0) is False
        assert metrics == {} and words in caplog.text


def test_another_layout_of_prime_rl_is_named(prime: None) -> None:
    with pytest.raises(ValueError, match="no inference_logprobs; this moe-rl was written for"):
        prime_rl.loss(SimpleNamespace(trainer_logprobs=0, advantages=0, loss_mask=0))
