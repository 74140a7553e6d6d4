"""The training loop's laws, on runs of a second."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_rl.config import ConfigError, RunConfig
from moe_rl.losses import ALGORITHMS
from moe_rl.policy.forward import ForwardOptions, response_pass
from moe_rl.policy.policy import Policy
from moe_rl.presets import preset
from moe_rl.recorded import inspect_batch, read_batch
from moe_rl.run_folder.log import (
    RunLog,
    check_run_folder,
    is_complete,
    lock_run_folder,
    write_config,
)
from moe_rl.tasks import task_of
from moe_rl.training.cold_start import starting_policy
from moe_rl.training.run import train
from moe_rl.training.trainer import Trainer, learning_rate

TIMES = ("seconds", "instruments_share")


def tiny(**changes: Any) -> RunConfig:
    small = {"steps": 2, "prompts_per_rollout": 4, "group_size": 4, "learning_rate": 2e-3}
    return preset("tiny").replace(**(small | changes))


@pytest.fixture(scope="module")
def cold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cold")


def start_of(config: RunConfig, cold: Path) -> Policy:
    return starting_policy(config, task_of(config.task), cold)


def trainer_of(config: RunConfig, folder: Path, cold: Path) -> Trainer:
    task = task_of(config.task)
    return Trainer(config, start_of(config, cold), task, RunLog(folder, config))


def run(config: RunConfig, folder: Path, cold: Path) -> tuple[list[dict], list[dict], dict]:
    summary = train(config, folder, cold_start_cache=cold)
    return read(folder / "steps.jsonl"), read(folder / "updates.jsonl"), summary


def read(path: Path) -> list[dict]:
    return [untimed(json.loads(line)) for line in path.read_text().splitlines()]


def untimed(values: dict) -> dict:
    return {k: v for k, v in values.items() if not k.startswith(TIMES)}


@pytest.mark.parametrize("changes", [{}, {"router_noise": 0.3, "routing_replay": "R3"}])
def test_equal_configs_give_bitwise_equal_metrics(
    changes: dict, tmp_path: Path, cold: Path
) -> None:
    first = run(tiny(**changes), tmp_path / "a", cold)
    second = run(tiny(**changes), tmp_path / "b", cold)
    assert first[:2] == second[:2]
    assert untimed(first[2]) == untimed(second[2])


@pytest.mark.parametrize(
    ("changes", "old_passes"),
    [({}, 1), ({"old_logprobs": "rollout"}, 0), ({"old_passes": 3}, 3)],
)
def test_a_step_says_what_its_rollout_was_and_what_it_cost(
    changes: dict, old_passes: int, tmp_path: Path, cold: Path
) -> None:
    config = tiny(sft_steps=20, **changes).named()  # responses of several lengths
    trainer = trainer_of(config, tmp_path, cold)
    experience, found = trainer.experience(0)
    batch = experience.batch
    lengths = [int(row.sum()) for row in batch.response_mask]
    assert len(set(lengths)) > 1
    assert found["response_length"] == pytest.approx(sum(lengths) / len(lengths))
    assert found["truncated"] == pytest.approx(sum(batch.truncated.tolist()) / len(lengths))
    # A prompt is read once a group. Forward 2 a parameter, and 6 with the gradient: once to sample,
    # in each old pass, and in the update.
    tokens = int(batch.prompt_mask.sum()) + sum(lengths)
    assert found["operations"] == 2 * trainer.policy.active_parameters * tokens * (4 + old_passes)


def test_the_final_reward_is_that_of_the_last_eighth_of_the_steps(
    tmp_path: Path, cold: Path
) -> None:
    steps, _, summary = run(tiny(steps=17, instruments=False), tmp_path, cold)
    rewards = [step["reward"] for step in steps]
    assert summary["final_reward"] == pytest.approx(sum(rewards[-2:]) / 2)
    assert len({*rewards[-2:], summary["final_reward"]}) == 3


def test_another_seed_gives_another_run(tmp_path: Path, cold: Path) -> None:
    first, _, _ = run(tiny(seed=1), tmp_path / "a", cold)
    second, _, _ = run(tiny(seed=2), tmp_path / "b", cold)
    assert first != second


@pytest.mark.parametrize("algorithm", ["grpo", "gspo", "gspo_token"])
@pytest.mark.parametrize("replay", ["disabled", "R2", "R3"])
def test_the_first_update_is_on_policy(
    algorithm: str, replay: str, tmp_path: Path, cold: Path
) -> None:
    config = tiny(algorithm=algorithm, routing_replay=replay, steps=1)
    _, updates, _ = run(config, tmp_path / "run", cold)
    first = updates[0]
    # Up to rounding: the passes with and without gradients may sum in another order.
    assert abs(first["ratio/token_log_max"]) < 1e-5
    assert first["ratio/token_var"] < 1e-11
    assert first["routing/churn"] == 0.0
    assert first["clip_ratio/region"] == 0.0
    assert updates[-1]["ratio/token_log_var"] > 0.0


def test_an_engine_equal_to_the_trainer_makes_r3_equal_r2(tmp_path: Path, cold: Path) -> None:
    r2 = run(tiny(routing_replay="R2"), tmp_path / "r2", cold)
    r3 = run(tiny(routing_replay="R3"), tmp_path / "r3", cold)
    assert all(step["mismatch/churn"] == 0.0 for step in r3[0])
    for ours, theirs in zip(r2[1], r3[1], strict=True):
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
        assert ours["ratio/token_log_var"] == pytest.approx(
            theirs["ratio/token_log_var"], rel=1e-2, abs=1e-9
        )


def test_replay_holds_the_routes_while_the_live_choice_drifts(tmp_path: Path, cold: Path) -> None:
    config = tiny(routing_replay="R2", learning_rate=2e-2, steps=1)
    _, updates, _ = run(config, tmp_path / "run", cold)
    assert updates[-1]["routing/churn"] > 0.0
    assert updates[-1]["ratio/routing_part"] > 0.0


@pytest.mark.parametrize("replay", ["disabled", "R2"])
def test_the_two_parts_make_up_the_live_log_ratio(replay: str, tmp_path: Path, cold: Path) -> None:
    config = tiny(routing_replay=replay, learning_rate=2e-2, steps=1)
    _, updates, _ = run(config, tmp_path / "run", cold)
    last = updates[-1]
    total = (
        last["ratio/routing_part"] + last["ratio/weight_part"] + 2 * last["ratio/part_covariance"]
    )
    if replay == "disabled":
        assert total == pytest.approx(last["ratio/token_log_var"], rel=1e-9)
    else:  # the loss saw the replayed ratio: the weight part alone
        assert last["ratio/weight_part"] == pytest.approx(last["ratio/token_log_var"], rel=1e-9)


def test_the_split_is_taken_on_each_rollouts_last_update(tmp_path: Path, cold: Path) -> None:
    _, updates, _ = run(tiny(), tmp_path / "run", cold)
    split = [u["update"] for u in updates if "ratio/routing_part" in u]
    assert split == [3, 3]


@pytest.mark.parametrize(
    ("changes", "split"),
    [
        ({}, True),
        ({"routing_replay": "R2"}, True),
        ({"routing_replay": "R3"}, True),
        ({"old_logprobs": "rollout"}, True),
        ({"old_logprobs": "rollout", "routing_replay": "R3"}, True),
        ({"old_logprobs": "rollout", "routing_replay": "R2"}, False),
        ({"old_passes": 2}, False),
    ],
)
def test_with_equal_weights_the_weight_part_is_zero_or_there_is_no_split(
    changes: dict[str, Any], split: bool, tmp_path: Path, cold: Path
) -> None:
    config = tiny(router_noise=0.5, updates_per_rollout=1, steps=1, **changes)
    _, (update,), _ = run(config, tmp_path / "run", cold)
    assert ("ratio/weight_part" in update) is split
    if split:
        assert update["ratio/weight_part"] < 1e-8
        assert update["ratio/routing_part"] > 1e-4


def test_a_dense_model_has_no_routing_to_change(tmp_path: Path, cold: Path) -> None:
    config = tiny(num_experts=2, learning_rate=2e-2)
    steps, updates, _ = run(config, tmp_path / "run", cold)
    assert all(u["routing/churn"] == 0.0 for u in updates)
    assert updates[-1]["ratio/routing_part"] < 1e-10  # the sum over experts runs in another order
    assert updates[-1]["ratio/weight_part"] > 0.0
    assert all(step["routing/dead_experts"] == 0.0 for step in steps)


def test_instruments_do_not_change_the_run(tmp_path: Path, cold: Path) -> None:
    on = tiny(save_every=2, routing_replay="R2", router_noise=0.2)
    off = dataclasses.replace(on, instruments=False)
    for name, config in (("on", on), ("off", off)):
        train(config, tmp_path / name, cold_start_cache=cold)
    weights = [
        (tmp_path / name / "policy_00002" / "model.safetensors").read_bytes()
        for name in ("on", "off")
    ]
    assert weights[0] == weights[1]


def test_a_recorded_batch_is_what_the_updates_saw(tmp_path: Path, cold: Path) -> None:
    noisy = {"steps": 4, "router_noise": 0.2, "routing_replay": "R3"}
    steps, updates, _ = run(tiny(record_every=2, **noisy), tmp_path / "recorded", cold)
    plain, _, _ = run(tiny(**noisy), tmp_path / "plain", cold)
    assert [untimed(line) for line in steps] == [untimed(line) for line in plain]
    folder = tmp_path / "recorded" / "batches"
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["step_00001.safetensors", "step_00003.safetensors"]
    found = inspect_batch(read_batch(folder / names[1])).metrics
    for name in ("kl_k3", "churn", "router_disagreement", "token_disagreement", "extreme_2"):
        assert found[f"mismatch/{name}"] == pytest.approx(steps[3][f"mismatch/{name}"], rel=1e-5)
    own = [line for line in updates if line["step"] == 3]
    largest = max(line["ratio/token_log_max"] for line in own)
    assert found["ratio/token_log_max"] == pytest.approx(largest, rel=1e-5)
    assert found["replay/coverage"] == 1


@pytest.mark.parametrize("algorithm", ["grpo", "dapo", "dr_grpo", "rspo"])
def test_gradient_accumulation_gives_the_gradient_of_one_pass(
    algorithm: str, tmp_path: Path, cold: Path
) -> None:
    config = tiny(steps=1, updates_per_rollout=1, algorithm=algorithm, router_noise=0.2)
    one = run(config, tmp_path / "one", cold)
    two = run(config.replace(prompts_per_forward=1), tmp_path / "two", cold)
    for key in ("loss", "grad_norm"):
        assert one[1][0][key] == pytest.approx(two[1][0][key], rel=1e-4, abs=1e-6)


def test_a_frozen_router_stays_while_the_rest_moves(tmp_path: Path, cold: Path) -> None:
    config = tiny(freeze_router=True, save_every=2, learning_rate=1e-2)
    train(config, tmp_path / "run", cold_start_cache=cold)
    from safetensors.torch import load_file

    start = start_of(config, cold).model.state_dict()
    end = load_file(tmp_path / "run" / "policy_00002" / "model.safetensors")
    gates = [name for name in end if name.endswith("mlp.gate.weight")]
    assert gates
    assert all(torch.equal(start[name], end[name]) for name in gates)
    assert not torch.equal(
        start["model.layers.0.self_attn.q_proj.weight"],
        end["model.layers.0.self_attn.q_proj.weight"],
    )


def test_router_noise_separates_engine_and_trainer(tmp_path: Path, cold: Path) -> None:
    clean, _, _ = run(tiny(steps=1), tmp_path / "clean", cold)
    noisy, updates, _ = run(tiny(steps=1, router_noise=0.5), tmp_path / "noisy", cold)
    assert clean[0]["mismatch/churn"] == 0.0
    assert noisy[0]["mismatch/churn"] > 0.02
    assert updates[0]["routing/churn"] > 0.02  # two passes of equal weights already differ


def test_old_log_probs_straight_from_the_engine_make_the_same_first_update(
    tmp_path: Path, cold: Path
) -> None:
    ours = run(tiny(steps=1), tmp_path / "trainer", cold)[1][0]
    engine = run(tiny(steps=1, old_logprobs="rollout"), tmp_path / "rollout", cold)[1][0]
    assert engine["ratio/token_log_var"] < 1e-9
    assert engine["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("kind", ["router_noise", "hidden_noise"])
@pytest.mark.parametrize("noisy", ["rollout", "old", "update", "all"])
def test_noise_is_drawn_in_the_pass_that_is_named_and_in_no_other(
    noisy: str, kind: str, tmp_path: Path, cold: Path
) -> None:
    """A run without noise makes each of the other passes over the same batch bit for bit."""
    config = tiny(**{kind: 0.5}, router_noise_passes=noisy)
    trainer = trainer_of(config, tmp_path / "noisy", cold)
    clean = trainer_of(tiny(), tmp_path / "clean", cold)
    experience, _ = trainer.experience(0)
    batch = experience.batch
    sampled = clean.experience(0)[0].batch.rollout_logprobs
    assert torch.equal(batch.rollout_logprobs, sampled) == (noisy not in ("rollout", "all"))
    old = clean.learner.passes.old_pass(batch, 0).logprobs
    assert torch.equal(experience.old_logprobs, old) == (noisy not in ("old", "all"))
    ours, theirs = (
        [part.output.logprobs for part in each.learner.gradients(experience, 0, 0)]
        for each in (trainer, clean)
    )
    assert torch.equal(torch.cat(ours), torch.cat(theirs)) == (noisy not in ("update", "all"))


@pytest.mark.parametrize("num_experts", [8, 2])
def test_hidden_noise_lets_passes_disagree_and_routes_agree(
    num_experts: int, tmp_path: Path, cold: Path
) -> None:
    config = tiny(steps=1, hidden_noise=0.5, num_experts=num_experts)
    (step,), (first, *_), _ = run(config, tmp_path / "run", cold)
    assert step["mismatch/kl_k3"] > 1e-3 and first["ratio/token_log_var"] > 1e-3
    assert step["mismatch/churn"] == 0.0 and first["routing/churn"] == 0.0


def test_several_old_passes_give_the_mean_of_their_probabilities(
    tmp_path: Path, cold: Path
) -> None:
    trainer = trainer_of(tiny(router_noise=0.5, old_passes=3), tmp_path / "three", cold)
    experience, _ = trainer.experience(0)
    mask = experience.batch.response_mask
    passes = [
        trainer.learner.passes._old_forward(experience.batch, 0, number).logprobs[mask].double()
        for number in (None, 1, 2)
    ]
    assert not torch.equal(passes[0], passes[1]) and not torch.equal(passes[1], passes[2])
    mean = sum(logprobs.exp() for logprobs in passes) / 3
    torch.testing.assert_close(
        experience.old_logprobs[mask].double().exp(), mean, rtol=1e-5, atol=1e-7
    )
    one, _ = trainer_of(tiny(router_noise=0.5), tmp_path / "one", cold).experience(0)
    assert torch.equal(one.old_logprobs[mask].double(), passes[0])
    assert torch.equal(one.old_routes, experience.old_routes), "routes are those of the first"


def test_without_noise_several_old_passes_are_one(tmp_path: Path, cold: Path) -> None:
    one, three = (
        trainer_of(tiny(old_passes=count), tmp_path / str(count), cold).experience(0)[0]
        for count in (1, 3)
    )
    mask = one.batch.response_mask
    torch.testing.assert_close(
        one.old_logprobs[mask], three.old_logprobs[mask], rtol=1e-6, atol=1e-6
    )


def test_the_engines_log_probs_with_r2_replay_the_trainers_routes(
    tmp_path: Path, cold: Path
) -> None:
    config = tiny(router_noise=0.5, routing_replay="R2", old_logprobs="rollout")
    experience, _ = trainer_of(config, tmp_path / "engine", cold).experience(0)
    own, _ = trainer_of(
        config.replace(old_logprobs="trainer"), tmp_path / "trainer", cold
    ).experience(0)
    assert torch.equal(experience.old_logprobs, experience.batch.rollout_logprobs)
    assert not torch.equal(experience.old_logprobs, own.old_logprobs)
    assert experience.replay is not None and own.replay is not None
    assert torch.equal(experience.replay, own.replay)
    assert not torch.equal(experience.replay, experience.batch.routed_experts)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_trains(algorithm: str, tmp_path: Path, cold: Path) -> None:
    config = tiny(algorithm=algorithm, router_noise=0.2, updates_per_rollout=2)
    _, updates, _ = run(config, tmp_path / "run", cold)
    assert len(updates) == 4 and not any(update["skipped"] for update in updates)
    assert max(update["grad_norm"] for update in updates) > 1e-4
    branches = ("positive_below", "positive_inside", "positive_above")
    branches += tuple(name.replace("positive", "negative") for name in branches)
    for update in updates:
        total = sum(update[f"branch/{name}"] for name in branches)
        assert total == pytest.approx(1.0) or (total == 0.0 and update["grad_norm"] < 1e-8)


@pytest.mark.parametrize("algorithm", ["grpo", "gspo", "gspo_token"])
def test_an_update_favours_the_responses_that_did_better(
    algorithm: str, tmp_path: Path, cold: Path
) -> None:
    config = tiny(algorithm=algorithm, prompts_per_rollout=16, updates_per_rollout=1)
    trainer = trainer_of(config, tmp_path / "run", cold)
    experience, _ = trainer.experience(0)
    mask = experience.batch.response_mask
    trainer.learner.update(experience, step=0, update=0)
    with torch.no_grad():
        logprobs = response_pass(trainer.policy, experience.batch, ForwardOptions()).logprobs
    gain = torch.where(mask, logprobs - experience.old_logprobs, 0.0).sum(1) / mask.sum(1)
    assert (experience.advantages != 0).any(), "the test needs groups with unequal rewards"
    assert (gain * experience.advantages).sum() > 0


def test_the_learning_rate_warms_up_and_decays_to_zero() -> None:
    config = RunConfig(steps=10, warmup_steps=2, learning_rate=1.0)
    rates = [learning_rate(config, step) for step in range(10)]
    assert rates[0] == pytest.approx(0.5)
    assert rates[1] == pytest.approx(0.9)
    assert rates[-1] == pytest.approx(0.1)
    constant = dataclasses.replace(config, learning_rate_schedule="constant")
    assert learning_rate(constant, 9) == 1.0


def test_a_cold_start_is_made_once(tmp_path: Path) -> None:
    def made() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/model.safetensors")}

    config = tiny(steps=1, sft_steps=2)
    start_of(config, tmp_path)
    before = made()
    start_of(config, tmp_path)
    start_of(dataclasses.replace(config, seed=9), tmp_path)
    assert made() == before, "the run's seed is no part of its cold start"
    start_of(config.replace(slip=0.3), tmp_path)
    assert len(made()) == 2


def test_a_folder_of_another_run_is_refused_and_kept(tmp_path: Path, cold: Path) -> None:
    run(tiny(steps=1), tmp_path / "run", cold)
    before = (tmp_path / "run" / "steps.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="steps=1, this one has 2"):
        train(tiny(), tmp_path / "run", cold_start_cache=cold)
    assert (tmp_path / "run" / "steps.jsonl").read_bytes() == before


def test_the_wrong_clip_scale_is_refused_before_a_folder_is_made(
    tmp_path: Path, cold: Path
) -> None:
    with pytest.raises(ValueError, match="clip"):
        train(tiny(algorithm="gspo", clip_low=0.2), tmp_path / "run", cold_start_cache=cold)
    assert not (tmp_path / "run").exists()


def test_metrics_are_finite_where_nothing_is_wrong(tmp_path: Path, cold: Path) -> None:
    steps, updates, _ = run(tiny(), tmp_path / "run", cold)
    for line in steps + updates:
        for key, value in line.items():
            values = value if isinstance(value, list) else [value]
            assert all(isinstance(v, int | float) and math.isfinite(v) for v in values), key


def test_advantages_are_centred_within_each_group(cold: Path, tmp_path: Path) -> None:
    config = tiny()
    trainer = trainer_of(config, tmp_path / "run", cold)
    experience, metrics = trainer.experience(0)
    assert experience.advantages.shape == (16,)
    assert 0.0 <= metrics["reward"] <= 1.0
    groups = experience.advantages.view(4, 4)
    torch.testing.assert_close(groups.mean(1), torch.zeros(4), atol=1e-6, rtol=0)


def test_gradient_checkpointing_trains_the_same(tmp_path: Path, cold: Path) -> None:
    plain = run(tiny(routing_replay="R2"), tmp_path / "plain", cold)
    saving = run(tiny(routing_replay="R2", gradient_checkpointing=True), tmp_path / "saving", cold)
    for ours, theirs in zip(plain[1], saving[1], strict=True):
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-2, abs=1e-5)


def test_bfloat16_trains_on_a_cpu(tmp_path: Path, cold: Path) -> None:
    steps, updates, _ = run(tiny(steps=1, dtype="bfloat16"), tmp_path / "run", cold)
    assert 0.0 < steps[0]["reward"] < 1.0
    assert all(math.isfinite(u["grad_norm"]) for u in updates)
    assert max(u["grad_norm"] for u in updates) > 0.0


def test_an_update_along_a_non_finite_gradient_is_skipped(tmp_path: Path, cold: Path) -> None:
    config = tiny(updates_per_rollout=1)
    trainer = trainer_of(config, tmp_path / "run", cold)
    experience, _ = trainer.experience(0)
    before = [p.clone() for p in trainer.learner.parameters]
    far = experience.old_logprobs - 1e4  # ratios overflow; those of bad responses are not clipped
    broken = dataclasses.replace(experience, old_logprobs=far)
    values = trainer.learner.update(broken, step=0, update=0)
    assert values["skipped"] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.learner.parameters, strict=True))
    assert trainer.learner.update(experience, step=0, update=0)["skipped"] == 0


def test_a_loaded_checkpoint_is_trained_as_it_is(tmp_path: Path, cold: Path) -> None:
    start = start_of(tiny(experts_per_token=3), cold)
    start.model.save_pretrained(tmp_path / "model")
    start.tokenizer.save_pretrained(tmp_path / "model")
    config = tiny(checkpoint=str(tmp_path / "model"), steps=1).replace(sft_steps=None)
    assert config.sft_steps == 0
    loaded = start_of(config, cold)
    assert all(
        torch.equal(a, b)
        for a, b in zip(start.model.parameters(), loaded.model.parameters(), strict=True)
    )
    assert config.model.experts_per_token == 2, "the checkpoint's three win"
    trainer = trainer_of(config, tmp_path / "run", cold)
    assert trainer.experience(0)[0].old_routes.shape[-1] == 3


@pytest.mark.parametrize(
    ("changes", "arm"),
    [
        ({}, "grpo"),
        ({"routing_replay": "R3"}, "grpo+replay"),
        ({"routing_replay": "TRR"}, "grpo+trr"),
        ({"algorithm": "gspo"}, "gspo"),
        ({"freeze_router": True}, "frozen-router"),
        ({"num_experts": 2}, "dense"),
        ({"arm": "mine"}, "mine"),
    ],
)
def test_a_run_is_named_after_its_settings(changes: dict, arm: str) -> None:
    assert tiny(**changes).named().arm == arm


def test_two_processes_cannot_write_one_run(tmp_path: Path, cold: Path) -> None:
    with (
        lock_run_folder(tmp_path / "run"),
        pytest.raises(ConfigError, match="another process is writing this run"),
    ):
        train(tiny(), tmp_path / "run", cold_start_cache=cold)
    lock_run_folder(tmp_path / "run").release()


def test_what_an_interrupted_start_leaves_behind_does_not_block_the_run(tmp_path: Path) -> None:
    for name in ("output.txt", "config.json.partial", "lock"):
        (tmp_path / name).write_text("")
    check_run_folder(tmp_path, tiny())


@pytest.mark.parametrize(("held", "given"), [({}, {"bound": 4.0}), ({"bound": 4.0}, {})])
def test_a_folder_of_other_loss_options_is_refused(
    held: dict[str, float], given: dict[str, float], tmp_path: Path
) -> None:
    write_config(tmp_path / "config.json", tiny(algorithm="dual_clip", loss_options=held))
    with pytest.raises(ConfigError, match="holds a run with loss_options="):
        check_run_folder(tmp_path, tiny(algorithm="dual_clip", loss_options=given))


@pytest.mark.parametrize("summary", ["", '{"schema": 1, "comp', '{"schema": 1, "complete": false}'])
def test_a_torn_summary_is_no_complete_run(summary: str, tmp_path: Path, cold: Path) -> None:
    train(tiny(steps=1), tmp_path / "run", cold_start_cache=cold)
    assert is_complete(tmp_path / "run")
    (tmp_path / "run" / "summary.json").write_text(summary)
    assert not is_complete(tmp_path / "run")


def test_a_run_that_starts_anew_is_not_complete_by_its_old_summary(
    tmp_path: Path, cold: Path
) -> None:
    config = tiny(steps=1)
    train(config, tmp_path / "run", cold_start_cache=cold)
    RunLog(tmp_path / "run", config.named()).close()
    assert not is_complete(tmp_path / "run")


def test_a_policy_that_cannot_be_built_leaves_no_folder_behind(tmp_path: Path, cold: Path) -> None:
    with pytest.raises(ConfigError, match="no config"):
        train(tiny(checkpoint=str(tmp_path / "gone")), tmp_path / "run", cold_start_cache=cold)
    assert not (tmp_path / "run").exists()
