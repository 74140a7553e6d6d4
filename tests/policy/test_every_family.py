"""What holds for each family that is offered: its numbers' types, its routers, how it is read."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_policy import ALPHABET, PROMPTS, rollout
from transformers import AutoModelForCausalLM

from moe_rl.config import ConfigError, ModelConfig
from moe_rl.policy import probe
from moe_rl.policy.build import build_policy
from moe_rl.policy.forward import ForwardOptions, choose_layout, response_pass
from moe_rl.policy.pass_noise import PassNoise
from moe_rl.policy.policy import Policy
from moe_rl.policy.probe import check_logits, has_unused_parameters, must_read_whole
from moe_rl.policy.tokenizer import tokenizer_of
from moe_rl.replay_check.families import build_family, causal_families, family_names
from moe_rl.rollout.cached import generate
from moe_rl.routing import collect_router_logits, find_routers


def saved(family: str, folder: Path, **changes: Any) -> Any:
    """A small random model of the family, saved with a tokenizer."""
    model: Any = build_family(family, **changes)
    model.save_pretrained(folder)
    tokenizer_of(ALPHABET).save_pretrained(folder)
    return model


def loaded(folder: Path, dtype: str = "float32", **options: Any) -> Policy:
    config = ModelConfig(checkpoint=str(folder), dtype=dtype, device="cpu")  # type: ignore[arg-type]
    return build_policy(config, ALPHABET, **options)


def types(model: Any) -> dict[str, torch.dtype]:
    """Of every parameter and buffer, by name."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.dtype for name, tensor in named}


@pytest.mark.parametrize("family", causal_families())
def test_a_policy_has_the_numbers_that_transformers_loads(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16 too: a cast of the whole model would take along what is kept in float32."""
    # Only what is loaded counts here, and the probe would take most of the time.
    monkeypatch.setattr("moe_rl.policy.build.must_read_whole", lambda policy, name: False)
    saved(family, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ours = loaded(tmp_path, "bfloat16").model
    assert types(ours) == types(theirs)
    assert {torch.bfloat16} < set(types(theirs).values()) or family in (
        *("granitemoehybrid", "jamba", "kimi_linear"),
    ), "nothing is kept in float32: the test could not fail"
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_a_built_policy_has_the_types_of_a_loaded_one(family: str, tmp_path: Path) -> None:
    """And its files name the weights as those of any model of the family do."""
    config = ModelConfig(family=family, dtype="bfloat16", num_layers=1, device="cpu")  # type: ignore[arg-type]
    policy = build_policy(config, ALPHABET)
    policy.model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert types(policy.model) == types(theirs)
    assert {torch.bfloat16} < set(types(theirs).values())
    fresh = AutoModelForCausalLM.from_config(policy.model.config)
    fresh.save_pretrained(tmp_path / "fresh")
    names = [load_file(f / "model.safetensors").keys() for f in (tmp_path, tmp_path / "fresh")]
    assert names[0] == names[1]


@pytest.mark.parametrize("family", family_names())
def test_freezing_routers_freezes_all_that_they_have_and_nothing_else(family: str) -> None:
    model: Any = build_family(family)
    named = dict(model.named_parameters())
    could = {name for name, parameter in named.items() if parameter.requires_grad}
    Policy(model=model, tokenizer=tokenizer_of(ALPHABET), experts="eager").freeze_routers()
    frozen = {name for name in could if not named[name].requires_grad}
    # JetMoe's experts of attention hold their router.
    assert frozen and not [name for name in frozen if re.search(r"experts\.(?!router)", name)]
    assert len(frozen) >= len(find_routers(model))
    # With all else frozen, nothing that is left decides; of the routers alone, all do.
    tokens = torch.randint(2, 60, (2, 5), generator=torch.Generator().manual_seed(0))
    for trained, learns in ((set(), False), (frozen, True)):
        for name, parameter in named.items():
            parameter.requires_grad_(name in trained)
        with collect_router_logits(model) as logits:
            model(tokens, use_cache=False)
        assert all(layer.requires_grad == learns for layer in logits)
    for name in could - frozen:
        named[name].requires_grad_(True)


# One of each kind: compressed attention, two kinds of linear attention, a state space, convolutions
# beside the experts, an attention whose padding must be masked by hand, and a plain cache.
READ = {
    "deepseek_v4": "whole",
    "jamba": "whole",
    "qwen3_next": "whole",
    "minimax": "whole",
    "inkling_text": "whole",
    "zaya": "whole",
    "mixtral": "cached",
}


@pytest.mark.parametrize("family", READ)
def test_engine_and_trainer_agree_however_a_family_is_read(family: str, tmp_path: Path) -> None:
    """And both with the model itself, on each sequence alone without padding."""
    model = saved(family, tmp_path, max_position_embeddings=64)
    policy = loaded(tmp_path)
    assert choose_layout(policy) == READ[family]
    batch = rollout(policy, PROMPTS, group=2, length=4)
    replay = ForwardOptions(replay=batch.routed_experts, router_logits=True)
    with torch.no_grad():
        read = response_pass(policy, batch, replay)
    kept = batch.response_mask
    near: dict[str, Any] = {"atol": 2e-4, "rtol": 1e-4}
    torch.testing.assert_close(read.logprobs[kept], batch.rollout_logprobs[kept], **near)
    assert read.router_logits is not None and batch.router_logits is not None
    torch.testing.assert_close(read.router_logits[kept], batch.router_logits[kept], **near)
    prompt = batch.prompt_ids[0][batch.prompt_mask[0]]
    response = batch.response_ids[0][kept[0]]
    with torch.no_grad():
        alone = model(torch.cat([prompt, response])[None], use_cache=False).logits[0]
    expected = alone[len(prompt) - 1 : -1].log_softmax(-1).gather(-1, response[:, None])[:, 0]
    torch.testing.assert_close(batch.rollout_logprobs[0][kept[0]], expected, **near)


def test_whole_sequences_record_and_perturb_as_a_cache_does(tmp_path: Path) -> None:
    saved("mixtral", tmp_path)
    cached = loaded(tmp_path)
    whole = Policy(
        model=cached.model, tokenizer=cached.tokenizer, experts=cached.experts, reads_whole=True
    )
    noise = PassNoise(std=0.5, seed=1, step=0, purpose="rollout", prompts=range(4), group_size=2)
    draws = torch.rand(8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first, second = (
        generate(p, PROMPTS, draws, noise=noise, router_logits=True, gate_weights=True)
        for p in (cached, whole)
    )
    assert torch.equal(first.response_ids, second.response_ids)
    assert torch.equal(first.routed_experts, second.routed_experts)  # type: ignore[arg-type]
    for name in ("rollout_logprobs", "router_logits", "gate_weights"):
        ours, theirs = getattr(first, name), getattr(second, name)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4, equal_nan=True)


def broken(policy: Policy, monkeypatch: pytest.MonkeyPatch, *ways: str) -> Policy:
    """The policy with ways of reading that see tokens one place too late."""

    def late(self: Any) -> torch.Tensor:
        return self.truth.roll(1, dims=1)

    for way in ways:
        monkeypatch.setattr(probe._Probe, way, late)
    return policy


def test_a_cache_that_continues_wrongly_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved("mixtral", tmp_path)
    for dtype in ("float32", "bfloat16"):
        policy = loaded(tmp_path, dtype)
        assert not must_read_whole(policy, "model")
        with monkeypatch.context() as patch:
            assert must_read_whole(broken(policy, patch, "read_with_cache"), "model")


def test_a_model_that_does_not_run_is_refused(tmp_path: Path) -> None:
    saved("mixtral", tmp_path)
    policy = loaded(tmp_path)
    policy.model.model.layers[0].mlp.gate.weight.data = torch.ones(8, 16)
    for check in (check_logits, must_read_whole):
        with pytest.raises(ConfigError, match=r"^model: MixtralForCausalLM does not run in torch"):
            check(policy, "model")


def test_a_model_that_cannot_be_read_at_all_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved("mixtral", tmp_path)
    policy = broken(loaded(tmp_path), monkeypatch, "read_with_cache", "read_whole")
    with pytest.raises(ConfigError, match=r"^model: .*neither with a cache \(hidden states differ"):
        must_read_whole(policy, "model")


@pytest.mark.parametrize(("family", "unused"), [("deepseek_v32", True), ("mixtral", False)])
def test_parameters_without_a_gradient_are_seen(family: str, unused: bool, tmp_path: Path) -> None:
    saved(family, tmp_path)
    policy = loaded(tmp_path)
    assert has_unused_parameters(policy) == unused
    assert all(parameter.grad is None for parameter in policy.model.parameters())


@pytest.mark.parametrize("family", ["granitemoe", "cohere2_moe", "inkling2_text"])
def test_scaled_and_capped_logits_are_those_of_the_model(family: str, tmp_path: Path) -> None:
    scaled = {"logits_scaling": 8.0} if family == "granitemoe" else {}
    model = saved(family, tmp_path, **scaled)
    policy = loaded(tmp_path, temperature=2.0)
    assert policy.final.scale != 1 or policy.final.softcap is not None
    batch = rollout(policy, PROMPTS[:1], group=2, length=3)
    with torch.no_grad():
        read = response_pass(policy, batch, ForwardOptions())
        ids = torch.cat([batch.prompt_ids.repeat(2, 1), batch.response_ids], dim=1)
        logits = model(ids, use_cache=False).logits[:, batch.prompt_ids.shape[1] - 1 : -1]
    expected = (logits / 2.0).log_softmax(-1).gather(-1, batch.response_ids[..., None])[..., 0]
    kept = batch.response_mask
    for found in (read.logprobs, batch.rollout_logprobs):
        torch.testing.assert_close(found[kept], expected[kept], atol=1e-4, rtol=1e-4)


def test_a_model_whose_logits_are_not_its_heads_is_refused(tmp_path: Path) -> None:
    """Whether its config says so, as Inkling's that cuts its vocabulary short, or not."""
    saved("inkling_text", tmp_path / "cut", unpadded_vocab_size=48)
    with pytest.raises(ConfigError, match=r"^checkpoint=.*its final logits .* not those of"):
        loaded(tmp_path / "cut")
    saved("mixtral", tmp_path / "doubled")

    def double(model: Any, given: Any, output: Any) -> None:
        output.logits.mul_(2)

    policy = loaded(tmp_path / "doubled")
    check_logits(policy, "model")
    policy.model.register_forward_hook(double)
    with pytest.raises(ConfigError, match=r"^model: MixtralForCausalLM gives logits that are not"):
        check_logits(policy, "model")


def test_an_experts_backend_by_name_needs_a_model_that_takes_one(tmp_path: Path) -> None:
    saved("dbrx", tmp_path)
    assert loaded(tmp_path).experts == "own"
    config = ModelConfig(checkpoint=str(tmp_path), experts_implementation="grouped_mm")
    with pytest.raises(ConfigError, match=r"experts_implementation='grouped_mm': DbrxForCausalLM"):
        build_policy(config, ALPHABET)
