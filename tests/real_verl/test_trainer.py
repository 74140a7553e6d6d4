"""Our trainer of verl reads a step's batch from a real TransferQueue, and measures it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import transfer_queue
from omegaconf import OmegaConf
from tensordict import TensorDict
from torch import Tensor
from verl.trainer.ppo.v1.trainer_base import get_trainer_cls
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from moe_rl.integrations import verl_engine, verl_trainer
from moe_rl.metrics.ratios import mismatch_statistics
from moe_rl.recorded import read_batch

PROMPTS, RESPONSES = (3, 5, 4, 2), (6, 2, 8, 5)
L, K, E = 3, 2, 16


@pytest.fixture(scope="module")
def queue() -> Iterator[None]:
    # Its controller and its storage each take a core of Ray's, which are numbers to Ray.
    ray.init("local", num_cpus=16, include_dashboard=False, log_to_driver=False)
    transfer_queue.init()
    yield
    transfer_queue.close()
    ray.shutdown()


def rows() -> list[dict[str, Tensor]]:
    rng = torch.Generator().manual_seed(0)
    made = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        draws = torch.rand(prompt + response, L, E, generator=rng)
        routes = draws.topk(K, dim=-1).indices.to(torch.int16)
        routes[-1] = 0  # the last token is never fed: verl fills its row
        made.append(
            {
                "prompts": torch.ones(prompt, dtype=torch.int64),
                "response_mask": torch.ones(response, dtype=torch.int64),
                "old_log_probs": -torch.rand(response, generator=rng),
                "rollout_log_probs": -torch.rand(response, generator=rng),
                "advantages": torch.randn(1, generator=rng).expand(response).clone(),
                "routed_experts": routes,
            }
        )
    return made


def put(made: list[dict[str, Tensor]], partition: str, **tags: Any) -> Any:
    """A step's batch in the queue, as verl's agent loop and trainer write it."""
    fields = TensorDict(
        {
            name: torch.nested.as_nested_tensor([row[name] for row in made], layout=torch.jagged)
            for name in made[0]
        },
        batch_size=[len(made)],
    )
    keys = [f"{partition}_{n}" for n in range(len(made))]
    common = {"min_global_steps": 4, "max_global_steps": 4, "is_padding": False} | tags
    own = [dict(common) for _ in keys]
    return transfer_queue.kv_batch_put(keys=keys, partition_id=partition, fields=fields, tags=own)


def measured(batch: Any, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> dict[str, float]:
    """Metrics of a step by our trainer, in which verl's own, which need GPUs, are left out."""
    monkeypatch.setattr(PPOTrainerSync, "_compute_metrics", lambda *given: None)
    trainer = object.__new__(verl_trainer.MeasuredTrainer)
    trainer.config = OmegaConf.create({"trainer": settings})
    metrics: dict[str, float] = {}
    trainer._compute_metrics(batch, metrics, {}, 5, 0)
    return metrics


def test_the_trainer_is_registered() -> None:
    assert get_trainer_cls("moe_rl_sync") is verl_trainer.MeasuredTrainer


def test_a_step_is_measured_and_written(
    queue: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = rows()
    batch = put(made, "whole")
    found = measured(batch, monkeypatch, moe_rl_record_dir=str(tmp_path), moe_rl_record_every=5)

    def padded(name: str) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence([row[name] for row in made], batch_first=True)

    mask = padded("response_mask").bool()
    expected = mismatch_statistics(padded("old_log_probs"), padded("rollout_log_probs"), mask)
    for name, value in expected.items():
        assert found[f"moe_rl/{name}"] == pytest.approx(value, rel=1e-5)
    assert found["moe_rl/replay/coverage"] == 1
    assert found["moe_rl/rollout/mixed_versions"] == 0
    written = read_batch(tmp_path / "step_5.safetensors")
    assert written.source == "verl" and written.routes is not None
    for n, row in enumerate(made):
        routes = row["routed_experts"][PROMPTS[n] - 1 : -1]
        assert torch.equal(written.routes[n, : RESPONSES[n]], routes)


def test_rows_of_expert_0_are_lost_and_padding_is_left_out(
    queue: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = rows()
    made[2]["routed_experts"][PROMPTS[2] + 1 :] = 0
    lost = RESPONSES[2] - 2
    batch = put(made, "zeros", max_global_steps=6)
    found = measured(batch, monkeypatch)
    assert found["moe_rl/replay/coverage"] == pytest.approx(1 - lost / sum(RESPONSES))
    assert found["moe_rl/rollout/mixed_versions"] == 1
    batch.tags[2]["is_padding"] = True
    assert measured(batch, monkeypatch)["moe_rl/replay/coverage"] == 1


def test_the_trainer_s_routes_are_held_against_the_engine_s(
    queue: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = rows()
    for row in made:
        row[verl_engine.FIELD] = row["routed_experts"].clone()
    made[2][verl_engine.FIELD][PROMPTS[2] + 1, 1] += E  # one router of one response token
    found = measured(put(made, "both"), monkeypatch)
    routers = sum(RESPONSES) * L
    assert found["moe_rl/mismatch/router_disagreement"] == pytest.approx(1 / routers)
    assert found["moe_rl/mismatch/token_disagreement"] == pytest.approx(L / routers)


def test_dense_layers_of_the_engine_s_record_are_left_out() -> None:
    """vLLM has a row for every decoder layer, the trainer for those with a router."""
    made = rows()
    for row in made:
        own = row["routed_experts"]
        row[verl_engine.FIELD] = own.clone()
        row["routed_experts"] = torch.cat([torch.zeros_like(own[:, :1]), own], dim=1)
    fields = {name: [row[name] for row in made] for name in made[0]}
    batch = verl_trainer.batch_of(fields, [{}] * len(made))
    assert batch.notes == ("1 layers without a route left out: dense layers",)
    assert batch.routes is not None and batch.routes.shape == batch.trainer_routes.shape
    fields[verl_engine.FIELD] = [row[verl_engine.FIELD][:, :1] for row in made]
    batch = verl_trainer.batch_of(fields, [{}] * len(made))
    assert batch.trainer_routes is None and "left out: [1, 2] layers" in batch.notes[0]


def test_what_the_rollout_did_not_write_is_left_out(
    queue: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [
        {k: v for k, v in row.items() if k not in ("routed_experts", "rollout_log_probs")}
        for row in rows()
    ]
    found = measured(put(made, "bare"), monkeypatch)
    assert set(found) == {"moe_rl/rollout/mixed_versions"}


def test_a_queue_without_a_mask_is_named(queue: None) -> None:
    made = [{"prompts": row["prompts"]} for row in rows()]
    batch = put(made, "nothing")
    with pytest.raises(ValueError, match="'nothing' holds no response_mask"):
        verl_trainer.fetch(batch.keys, "nothing")


def test_fields_of_one_sequence_are_enough() -> None:
    row = rows()[0]
    batch = verl_trainer.batch_of({name: [value] for name, value in row.items()}, [{}])
    assert batch.mask.shape == (1, RESPONSES[0]) and batch.versions is None
    assert batch.routes is not None and batch.routes.shape == (1, RESPONSES[0], L, K)
