"""verl's own FSDP engine on a CPU: what it records and logs is what our functions say."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils
from verl.workers.config import (
    FSDPActorConfig,
    FSDPEngineConfig,
    FSDPOptimizerConfig,
    HFModelConfig,
)
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import (
    FSDPEngineWithLMHead,
    FSDPEngineWithValueHead,
)
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import response_from_nested

from moe_rl.integrations import verl_engine
from moe_rl.integrations.verl import PREFIX
from moe_rl.policy.build import build_policy
from moe_rl.presets import preset
from moe_rl.routing import record_routing, statistics

PROMPTS, RESPONSES = (3, 5, 4, 2), (6, 2, 8, 5)
MICRO = 2
BACKEND = "fsdp2"


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    file = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    policy = build_policy(preset("tiny").model, "0123456789+=", seed=1)
    policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    return folder


def engine_of(folder: Path, *, recompute: bool = False) -> Any:
    in_float32 = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    engine = EngineRegistry.new(
        model_type="language_model",
        backend=BACKEND,
        model_config=HFModelConfig(
            path=str(folder),
            load_tokenizer=False,
            use_remove_padding=False,
            override_config={"attn_implementation": "eager"},
            enable_gradient_checkpointing=recompute,
        ),
        engine_config=FSDPEngineConfig(
            strategy=BACKEND, use_torch_compile=False, mixed_precision=in_float32
        ),
        optimizer_config=FSDPOptimizerConfig(lr=0.03),
        checkpoint_config=CheckpointConfig(),
    )
    engine.initialize()
    return engine


def nested(rows: Any) -> Tensor:
    return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)


def tokens() -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    lengths = [a + b for a, b in zip(PROMPTS, RESPONSES, strict=True)]
    return [torch.randint(3, 12, (length,), generator=rng) for length in lengths]


def batch(fields: Mapping[str, Tensor] | None = None, *, entropy: bool = True) -> TensorDict:
    """A step's batch as verl's trainer hands it to its engine."""
    ids = tokens()
    parts = list(zip(ids, PROMPTS, strict=True))
    made = TensorDict(
        {
            "input_ids": nested(ids),
            "position_ids": nested(torch.arange(len(row)) for row in ids),
            "attention_mask": nested(torch.ones_like(row) for row in ids),
            "prompts": nested(row[:end] for row, end in parts),
            "responses": nested(row[end:] for row, end in parts),
            "response_mask": nested(torch.ones_like(row[end:]) for row, end in parts),
            "loss_mask": nested((torch.arange(len(row)) >= end).long() for row, end in parts),
            **(fields or {}),
        },
        batch_size=[len(ids)],
    )
    tensordict_utils.assign_non_tensor(
        made, temperature=1.0, use_dynamic_bsz=False, micro_batch_size_per_gpu=MICRO,
        use_remove_padding=False, use_fused_kernels=False, global_batch_size=len(ids),
        calculate_entropy=entropy, compute_loss=False,
    )  # fmt: skip
    return made


def old_pass(engine: Any, *, entropy: bool = True) -> dict[str, Tensor]:
    with engine.eval_mode():
        output: dict[str, Tensor] = engine.infer_batch(batch(entropy=entropy), loss_function=None)[
            "model_output"
        ]
    return output


def update(engine: Any, old: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Our metrics of one update, a value a micro-batch."""
    fields = {
        "old_log_probs": response_from_nested(old["log_probs"], batch()["response_mask"]),
        "advantages": nested(torch.linspace(-1, 1, r + 1)[1:] for r in RESPONSES),
    }
    if verl_engine.FIELD in old:
        fields[verl_engine.FIELD] = old[verl_engine.FIELD]
    config = FSDPActorConfig(
        strategy=BACKEND, rollout_n=1, ppo_micro_batch_size_per_gpu=MICRO, ppo_mini_batch_size=4
    )
    with engine.train_mode():
        output = engine.train_batch(batch(fields), loss_function=partial(ppo_loss, config=config))
    return {k: v for k, v in output["metrics"].items() if k.startswith(f"{PREFIX}routing/")}


def plain_routes(model: nn.Module) -> list[Tensor]:
    """The routes of each sequence, read alone."""
    found = []
    for row in tokens():
        with torch.no_grad(), record_routing(model) as recorded:
            model(input_ids=row[None])
        found.append(recorded.routed_experts[0])
    return found


def copy_of(engine: Any, folder: Path) -> nn.Module:
    """The engine's policy as a model of transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    state = {name: value.full_tensor() for name, value in engine.module.state_dict().items()}
    model.load_state_dict(state)
    return model.eval()


@pytest.mark.parametrize("recompute", [False, True])
def test_routes_and_churn_are_those_of_the_plain_model(
    group: None, checkpoint: Path, recompute: bool
) -> None:
    engine = engine_of(checkpoint, recompute=recompute)
    old = old_pass(engine)
    before = plain_routes(copy_of(engine, checkpoint))
    for row, expected in zip(old[verl_engine.FIELD].unbind(), before, strict=True):
        assert torch.equal(row, expected)
    first = update(engine, old)
    assert first[f"{PREFIX}routing/churn"] == [0, 0], "weights have not moved yet"
    after = plain_routes(copy_of(engine, checkpoint))
    second = update(engine, old)
    for micro in range(len(before) // MICRO):
        own = range(MICRO * micro, MICRO * (micro + 1))
        pairs = [[routes[n][PROMPTS[n] - 1 : -1] for n in own] for routes in (before, after)]
        churn = statistics.churn(torch.cat(pairs[0]), torch.cat(pairs[1]))
        for name, expected in (
            ("churn", churn),
            ("router_disagreement", statistics.router_disagreement(churn)),
            ("token_disagreement", statistics.token_disagreement(churn)),
        ):
            found = second[f"{PREFIX}routing/{name}"][micro]
            assert found == pytest.approx(expected.mean().item()) and found > 0
        assert second[f"{PREFIX}routing/margin"][micro] > 0


def test_a_reference_leaves_no_record_and_its_updates_no_metrics(
    group: None, checkpoint: Path
) -> None:
    engine = engine_of(checkpoint)
    found = old_pass(engine, entropy=False)
    assert verl_engine.FIELD not in found
    assert update(engine, found) == {}


def test_recording_changes_no_number(
    group: None, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = []
    for measured in (True, False):
        with monkeypatch.context() as patched:
            if not measured:
                original = FSDPEngineWithLMHead.forward_step.__wrapped__
                patched.setattr(FSDPEngineWithLMHead, "forward_step", original)
            engine = engine_of(checkpoint)
            old = old_pass(engine)
            update(engine, old)
            states.append((old["log_probs"].values(), engine.module.state_dict()))
    assert torch.equal(states[0][0], states[1][0])
    for name, value in states[0][1].items():
        assert torch.equal(value.full_tensor(), states[1][1][name].full_tensor()), name


def test_a_dense_model_trains_unmeasured(group: None, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 16}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(tmp_path)
    engine = engine_of(tmp_path)
    old = old_pass(engine)
    assert verl_engine.FIELD not in old and update(engine, old) == {}


def test_a_critic_is_not_measured_against_the_actor(group: None, checkpoint: Path) -> None:
    actor = engine_of(checkpoint)
    old = old_pass(actor)
    assert verl_engine._is_measured(actor)
    actor.__class__ = FSDPEngineWithValueHead  # which inherits the measured step
    assert not verl_engine._is_measured(actor)
    actor.__class__ = FSDPEngineWithLMHead
    assert update(actor, old)


def test_what_no_token_tells_is_left_out() -> None:
    routes = torch.zeros(9, 2, 2, dtype=torch.int16)
    offsets, margins = torch.tensor([0, 4, 9]), torch.ones(9, 2)
    masks = nested([torch.zeros(2), torch.zeros(3)])
    assert verl_engine.update_metrics(routes, routes, margins, offsets, masks) == {}
    masks = nested([torch.tensor([1, 0]), torch.tensor([0, 1, 1])])  # a tool's answer inside
    found = verl_engine.update_metrics(routes, routes, margins * torch.nan, offsets, masks)
    assert found == {
        f"routing/{name}": 0 for name in ("churn", "router_disagreement", "token_disagreement")
    }


def test_packed_and_padded_records_are_the_same_positions() -> None:
    rows = [torch.arange(length * 4).view(length, 2, 2) + 100 * length for length in (3, 5, 1)]
    offsets = torch.tensor([0, 3, 8, 9])
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
    behind = torch.full((2, 2, 2), -1)  # verl fills up to a bucket
    packed = torch.cat([*rows, behind])[None]
    for recorded in (padded, packed):
        assert torch.equal(verl_engine.packed(recorded, offsets), torch.cat(rows))
    one = verl_engine.packed(padded[:1], offsets[:2])
    assert torch.equal(one, rows[0])
