"""Routing replay in TRL's GRPOTrainer: what is replayed is what was recorded, row by row."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tiny_trl import RESPONSE, Spy, alone, build, like, logged, own_engine, tiny_model, whole
from trl import GRPOTrainer

from moe_rl.integrations.trl import RoutingReplayMixin
from moe_rl.losses import aggregate, make_inputs
from moe_rl.losses.gspo import gspo_loss
from moe_rl.routing import record_routing


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def train(folder: Path, **options: Any) -> Any:
    trainer = build(folder, kind=options.pop("kind", Spy), **options)
    trainer.train()
    return trainer


def weights(trainer: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_r2_changes_nothing_where_every_step_is_on_policy(tmp_path: Path) -> None:
    """TRL makes no pass of the old policy here; R2 makes its own."""
    plain, replayed = (
        train(tmp_path, args={"num_iterations": 1}, routing_replay=mode)
        for mode in ("disabled", "R2")
    )
    assert all("routed_experts" in seen["inputs"] for seen in replayed.seen)
    assert not any("old_per_token_logps" in seen["inputs"] for seen in replayed.seen)
    losses = [[line["loss"] for line in logged(trainer)] for trainer in (plain, replayed)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert torch.allclose(weights(plain), weights(replayed), atol=1e-6)


def test_the_diagnostics_change_nothing(tmp_path: Path) -> None:
    plain = train(tmp_path, kind=GRPOTrainer)
    watched = train(tmp_path, attribution_every=1)
    assert "ratio/routing_part" in logged(watched)[0]
    assert torch.equal(weights(plain), weights(watched))


def test_every_update_replays_what_the_old_policy_chose(tmp_path: Path) -> None:
    trainer = train(tmp_path, routing_replay="R2")
    for first, second in (trainer.seen[0:2], trainer.seen[2:4]):
        record = first["inputs"]["routed_experts"]
        assert torch.equal(second["inputs"]["routed_experts"], record)
        assert torch.equal(first["used"], record)
        assert torch.equal(second["used"], record)
    assert [line["replay/coverage"] for line in logged(trainer)] == [1.0] * 4
    churn = [line["routing/churn"] for line in logged(trainer)]
    assert churn[0] == churn[2] == 0.0 and min(churn[1], churn[3]) > 0.05
    # Without replay the same updates leave the record, so following it is no accident.
    live = train(tmp_path)
    assert "replay/coverage" not in logged(live)[1]
    assert not torch.equal(live.seen[1]["used"], live.seen[1]["inputs"]["live_routed_experts"])


def test_shuffling_and_splitting_keep_the_routes_of_each_sample(tmp_path: Path) -> None:
    """Against forwards of one unpadded sample, on the weights of the rollout and of the update."""
    settings = {"per_device_train_batch_size": 4, "steps_per_generation": 4, "num_iterations": 2}
    trainer = train(tmp_path, args={**settings, "max_steps": 8}, routing_replay="R2")
    old = like(tiny_model())
    padded = 0
    for seen in trainer.seen[:4] + trainer.seen[5:8]:
        new = tiny_model().eval()
        new.load_state_dict(seen["weights"])
        inputs = seen["inputs"]
        for row in range(4):
            tokens, places, prompt = whole(inputs, row)
            routes = inputs["routed_experts"][row, places][None]
            assert torch.equal(routes, alone(old, tokens, prompt, None)[1])
            logprobs, _ = alone(new, tokens, prompt, routes)
            assert torch.allclose(seen["logprobs"][row, : len(logprobs)], logprobs, atol=2e-5)
            padded += int((~places).sum())
    assert padded > 0 and logged(trainer)[5]["routing/churn"] > 0


def test_r3_of_an_engine_that_is_the_trainer_equals_r2(tmp_path: Path) -> None:
    settings = {"per_device_train_batch_size": 8, "steps_per_generation": 2}
    r2, r3 = (
        train(tmp_path, args=settings, routing_replay=mode, rollout_func=own_engine)
        for mode in ("R2", "R3")
    )
    assert torch.allclose(weights(r2), weights(r3), atol=1e-5)
    lines = zip(logged(r2), logged(r3), strict=True)
    for ours, theirs in lines:
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["routing/churn"] == pytest.approx(theirs["routing/churn"], abs=1e-6)
    assert logged(r3)[0]["mismatch/churn"] == 0.0
    assert logged(r3)[3]["routing/churn"] > 0.0


def shifted_engine(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """The trainer's own engine, but it went to the next experts."""
    out = own_engine(prompts, trainer)
    out["routed_experts"] = [((routes + 1) % 8).tolist() for routes in out["routed_experts"]]
    return out


@pytest.mark.parametrize("iterations", [1, 2])
def test_r3_replays_the_engine_and_not_the_trainer(tmp_path: Path, iterations: int) -> None:
    """Old log-probs too: the ratio of the first update is 1 under routes that nobody prefers."""
    settings = {"num_iterations": iterations, "max_steps": 2}
    trainer = train(tmp_path, args=settings, routing_replay="R3", rollout_func=shifted_engine)
    seen = trainer.seen[0]
    model = like(tiny_model())
    for row in range(8):
        tokens, places, prompt = whole(seen["inputs"], row)
        own = alone(model, tokens, prompt, None)[1]
        expected = (own[0, :-1] + 1) % 8
        assert torch.equal(seen["used"][row, places][:-1], expected)
    first = logged(trainer)[0]
    assert first["mismatch/churn"] > 0.3
    assert first["ratio/token_log_var"] < 1e-8
    assert first["routing/churn"] == 0.0


def test_r3_without_diagnostics_makes_no_pass_of_its_own(tmp_path: Path) -> None:
    passes = []

    class Counting(Spy):
        def _plain_pass(self, forward: Any, kwargs: Any) -> Any:
            passes.append(torch.is_grad_enabled())
            return super()._plain_pass(forward, kwargs)

    options = {"routing_replay": "R3", "rollout_func": own_engine, "routing_diagnostics": False}
    trainer = train(tmp_path, kind=Counting, args={"num_iterations": 1}, **options)
    assert passes == [True] * 4
    assert not [name for name in logged(trainer)[0] if name.startswith(("routing/", "ratio/"))]
    assert logged(trainer)[0]["replay/coverage"] == 1.0
    assert all("routed_experts" in seen["inputs"] for seen in trainer.seen)


def test_tokens_that_the_loss_does_not_count_may_lack_a_record(tmp_path: Path) -> None:
    """Those of tools, for which the engine may have answered from its cache."""

    def engine(prompts: list[str], trainer: Any) -> dict[str, Any]:
        out = shifted_engine(prompts, trainer)
        out["env_mask"] = [[1, 1, 0, 0, 1, 1][: len(c)] for c in out["completion_ids"]]
        for prompt, routes in zip(out["prompt_ids"], out["routed_experts"], strict=True):
            for row in routes[len(prompt) + 1 : len(prompt) + 3]:
                row[:] = [[-1, -1]] * 2
        return out

    settings = {"max_steps": 1, "num_iterations": 1}
    trainer = train(tmp_path, args=settings, routing_replay="R3", rollout_func=engine)
    inputs, used = trainer.seen[0]["inputs"], trainer.seen[0]["used"]
    live = (inputs["routed_experts"] < 0).any(dim=-1)
    assert live[:, inputs["prompt_ids"].shape[1] + 1].all()
    assert torch.equal(used[~live], inputs["routed_experts"][~live])
    assert logged(trainer)[0]["replay/coverage"] == 1.0


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_recomputes_with_the_record(tmp_path: Path, reentrant: bool) -> None:
    options = {"routing_replay": "R2", "attribution_every": 1}
    kind = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
    }
    plain = train(tmp_path, kind=Spy, **options)
    checkpointed = train(tmp_path, kind=Spy, args=kind, **options)
    assert logged(plain)[3]["routing/churn"] > 0
    assert torch.allclose(weights(plain), weights(checkpointed), atol=1e-6)
    for name in ("routing/churn", "ratio/routing_part", "ratio/token_log_var"):
        ours, theirs = ([line[name] for line in logged(t)] for t in (plain, checkpointed))
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-8)


def test_gspo_with_replay_minimises_the_sequence_loss_of_the_replayed_policy(
    tmp_path: Path,
) -> None:
    settings = {"importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4}
    trainer = train(tmp_path, args=settings, routing_replay="R2")
    for seen in trainer.seen:
        inputs = seen["inputs"]
        ours = make_inputs(
            seen["logprobs"],
            inputs["old_per_token_logps"],
            inputs["advantages"],
            inputs["completion_mask"].bool(),
        )
        expected = aggregate(gspo_loss(ours), ours, "sequence_mean")
        assert seen["loss"] == pytest.approx(expected.item(), abs=1e-6)
        assert torch.equal(seen["used"], inputs["routed_experts"])
    assert logged(trainer)[1]["ratio/sequence_var"] > 0


@pytest.mark.parametrize("iterations", [1, 2])
def test_adapters_learn_under_the_routes_of_the_adapted_model(
    tmp_path: Path, iterations: int
) -> None:
    """And not under those of the reference, the model without adapters, that TRL runs too."""
    lora = LoraConfig(
        r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], init_lora_weights=False
    )
    settings = {"beta": 0.1, "num_iterations": iterations, "max_steps": 2}
    trainer = build(tmp_path, kind=Spy, args=settings, routing_replay="R2", peft_config=lora)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    seen = trainer.seen[0]
    tokens, places, _ = whole(seen["inputs"], 0)
    trainer.model.load_state_dict(seen["weights"])
    with torch.no_grad():
        with record_routing(trainer.model) as adapted:
            trainer.model(tokens, use_cache=False)
        with trainer.model.disable_adapter(), record_routing(trainer.model) as reference:
            trainer.model(tokens, use_cache=False)
    assert not torch.equal(adapted.routed_experts, reference.routed_experts)
    assert torch.equal(seen["inputs"]["routed_experts"][0, places], adapted.routed_experts[0])
    assert all(torch.equal(s["used"], s["inputs"]["routed_experts"]) for s in trainer.seen)
    moved = [name for name, value in seen["weights"].items() if name in before and "lora" in name]
    assert moved and all("ref_per_token_logps" in s["inputs"] for s in trainer.seen)


def test_the_reference_model_routes_live(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "start")
    model.config._name_or_path = str(tmp_path / "start")
    used = []

    class Watching(Spy):
        def _plain_pass(self, forward: Any, kwargs: Any) -> Any:
            with record_routing(forward[0]) as recorded:
                found = super()._plain_pass(forward, kwargs)
            if forward[0] is self.ref_model:
                used.append(recorded.routed_experts)
            return found

    options = {"routing_replay": "R3", "rollout_func": shifted_engine}
    settings = {"beta": 0.1, "num_iterations": 1, "max_steps": 1}
    trainer = train(tmp_path, kind=Watching, model=model, args=settings, **options)
    inputs = trainer.seen[0]["inputs"]
    assert len(used) == 1
    # TRL shuffles the batch after its pass of the reference: compared as sets of rows.
    fresh = like(tiny_model())
    found = {str(row.tolist()) for row in used[0][:, inputs["prompt_ids"].shape[1] - 1 : -1]}
    for row in range(8):
        tokens, places, prompt = whole(inputs, row)
        if places[-1]:
            own = alone(fresh, tokens, prompt, None)[1][0, prompt - 1 : -1]
            assert str(own.tolist()) in found


def test_evaluation_is_trls(tmp_path: Path) -> None:
    """Reward functions get no routes there either: `reward` asserts it."""
    kept = []

    class Watching(Spy):
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            output = super()._generate_and_score_completions(inputs)
            if not self.model.training:
                kept.append(set(output))
            return output

    trainer = build(
        tmp_path,
        kind=Watching,
        args={"max_steps": 1, "per_device_eval_batch_size": 4},
        routing_replay="R3",
        rollout_func=own_engine,
        eval_dataset=build(tmp_path).train_dataset.select(range(2)),
    )
    metrics = trainer.evaluate()
    assert kept and not any(name.endswith("routed_experts") for names in kept for name in names)
    assert not [name for name in metrics if "routing" in name]


def test_the_load_balancing_loss_stays_live(tmp_path: Path) -> None:
    """TRL adds it to the loss of MoE models; it reads the routers' logits, not the record."""
    trainer = train(tmp_path, args={"router_aux_loss_coef": 0.1}, routing_replay="R2")
    assert all(line["aux_loss"] > 0 for line in logged(trainer))
    assert all(torch.equal(s["used"], s["inputs"]["routed_experts"]) for s in trainer.seen)


def test_the_mixin_stands_before_any_grpo_trainer(tmp_path: Path) -> None:
    class Own(GRPOTrainer):
        pass

    class Mixed(RoutingReplayMixin, Own):
        pass

    trainer = train(tmp_path, kind=Mixed, routing_replay="R2", args={"max_steps": 2})
    assert logged(trainer)[1]["routing/churn"] > 0


def test_a_rollout_func_may_use_the_trainers_own_pass(tmp_path: Path) -> None:
    """A forward that it makes is not the old policy's pass over the rollout."""

    def engine(prompts: list[str], trainer: Any, own: Any = own_engine) -> dict[str, Any]:
        tokens = torch.ones(2, RESPONSE + 1, dtype=torch.long)
        mask = torch.ones_like(tokens)
        with torch.no_grad():
            trainer._get_per_token_logps_and_entropies(trainer.model, tokens, mask, RESPONSE)
        return own(prompts, trainer)

    settings = {"max_steps": 2}
    plain = train(tmp_path, args=settings, routing_replay="R2", rollout_func=own_engine)
    used = train(
        tmp_path, args=settings, routing_replay="R2", rollout_func=functools.partial(engine)
    )
    assert torch.equal(weights(plain), weights(used))
