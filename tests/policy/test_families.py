"""The model families of the experiment: built to equal sizes, sampled, replayed, cold-started."""

import typing
from pathlib import Path

import pytest
import torch
from small_policy import ALPHABET, PROMPTS, rollout, widen

from moe_rl.batch import response_positions
from moe_rl.config import Family, RunConfig
from moe_rl.experiments.studies import study_plan
from moe_rl.policy.build import build_policy
from moe_rl.policy.forward import ForwardOptions, response_pass
from moe_rl.policy.policy import Policy
from moe_rl.presets import preset
from moe_rl.routing import collect_router_logits, find_routers, record_routing
from moe_rl.training.run import train

FAMILIES = typing.get_args(Family)
BY_FAMILY = pytest.mark.parametrize("family", FAMILIES)


def tiny(family: str) -> RunConfig:
    return preset("tiny").replace(family=family, steps=1, sft_steps=3)


def built(family: str, **changes: object) -> Policy:
    return widen(build_policy(tiny(family).replace(**changes).model, ALPHABET, seed=3))


@BY_FAMILY
def test_the_engine_and_the_trainer_agree(family: str) -> None:
    policy = built(family)
    batch = rollout(policy, PROMPTS)
    read = response_pass(policy, batch, ForwardOptions(router_logits=True))
    torch.testing.assert_close(
        read.logprobs[batch.response_mask],
        batch.rollout_logprobs[batch.response_mask],
        atol=1e-4,
        rtol=0,
    )
    assert read.routed_experts is not None and batch.routed_experts is not None
    kept = batch.response_mask
    length = batch.prompt_ids.shape[1]
    mine, theirs = (
        response_positions(r, length) for r in (read.routed_experts, batch.routed_experts)
    )
    assert (mine == theirs).all(dim=-1)[kept].float().mean() > 0.99


@BY_FAMILY
def test_replay_of_its_own_record_is_bitwise_and_of_anothers_is_not(family: str) -> None:
    policy = built(family)
    batch = rollout(policy, PROMPTS)
    live = response_pass(policy, batch, ForwardOptions())
    same = response_pass(policy, batch, ForwardOptions(replay=live.routed_experts))
    assert torch.equal(live.logprobs, same.logprobs)
    assert live.routed_experts is not None
    foreign = torch.where(live.routed_experts < 0, -1, (live.routed_experts + 3) % 8)
    other = response_pass(policy, batch, ForwardOptions(replay=foreign.to(torch.int16)))
    assert not torch.equal(live.logprobs, other.logprobs)


@BY_FAMILY
def test_families_have_equal_sizes(family: str) -> None:
    """Within a fifth at the study's size: DeepSeek has a shared expert more."""
    model = preset("mild-stale").model
    sizes = {
        name: build_policy(preset("mild-stale").replace(family=name).model, ALPHABET)
        for name in ("qwen3_moe", family)
    }
    for name in sizes:
        routers = find_routers(sizes[name].model)
        assert [(r.num_experts, r.top_k) for r in routers] == [
            (model.num_experts, model.experts_per_token)
        ] * model.num_layers
    ratio = sizes[family].active_parameters / sizes["qwen3_moe"].active_parameters
    assert 0.99 < ratio < 1.2


@BY_FAMILY
def test_router_logits_are_what_a_record_sees_and_have_a_graph(family: str) -> None:
    policy = built(family)
    ids = torch.randint(2, len(ALPHABET), (3, 5), generator=torch.Generator().manual_seed(0))
    with record_routing(policy.model, router_logits=True) as recorded:
        policy.model(ids)
    with collect_router_logits(policy.model) as logits:
        policy.model(ids)
    stacked = torch.stack([layer.reshape(3, 5, -1) for layer in logits], dim=2)
    torch.testing.assert_close(stacked.detach(), recorded.router_logits)
    stacked.square().sum().backward()
    for router in find_routers(policy.model):
        grads = [p.grad for p in router.module.parameters() if p.grad is not None]
        assert grads and all(grad.isfinite().all() for grad in grads)
    assert all(
        "forward" not in vars(r.module) or family == "qwen3_moe" for r in find_routers(policy.model)
    )


@BY_FAMILY
def test_a_run_trains_under_noise_with_replay(family: str, tmp_path: Path) -> None:
    config = tiny(family).replace(router_noise=0.3, routing_replay="R3", setting=family)
    summary = train(config, tmp_path / "run", cold_start_cache=tmp_path / "cold")
    assert summary["steps"] == 1
    dense = tiny(family).replace(num_experts=2, setting=family)
    assert train(dense, tmp_path / "dense", cold_start_cache=tmp_path / "cold")["steps"] == 1


def test_the_family_study_has_a_setting_a_family_and_paired_seeds(tmp_path: Path) -> None:
    study = study_plan("families", tmp_path)
    again = {"mixtral-again", "gpt_oss-again"}
    assert {c.setting for c in study.configs} == set(FAMILIES) - {"qwen3_moe"} | again
    for config in study.configs:
        assert config.model.family == config.setting.removesuffix("-again")
        assert config.router_noise > 0
        assert (config.routing_replay == "R3") == str(config.arm).endswith("+replay")
        assert (config.setting in again) == (config.seed > 25)  # new seeds test what others showed
    by_setting = {
        setting: {(c.arm, c.seed) for c in study.configs if c.setting == setting}
        for setting in ("olmoe", "gpt_oss", *again)
    }
    assert by_setting["olmoe"] == by_setting["gpt_oss"]
    assert by_setting["mixtral-again"] == by_setting["gpt_oss-again"]
