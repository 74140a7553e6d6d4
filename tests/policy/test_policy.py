"""The policy and its rollout engine: sampling, noise, checkpoints in and out."""

import json
from pathlib import Path

import pytest
import torch
from small_policy import ALPHABET, PROMPTS, rollout

from moe_rl.config import ConfigError, ModelConfig
from moe_rl.policy.build import build_policy
from moe_rl.policy.forward import ForwardOptions, response_pass
from moe_rl.policy.pass_noise import PassNoise
from moe_rl.policy.policy import Policy
from moe_rl.policy.tokenizer import tokenizer_of
from moe_rl.rollout.cached import generate, sample_tokens


def test_the_last_sampled_token_has_no_route(policy: Policy) -> None:
    batch = rollout(policy, PROMPTS)
    assert batch.routed_experts.shape[1] == batch.prompt_ids.shape[1] + batch.response_ids.shape[1]
    assert (batch.routed_experts[:, -1] == -1).all()
    assert (batch.routed_experts[:, :-1] >= 0).all()


def test_responses_end_at_the_end_of_sequence(policy: Policy) -> None:
    batch = rollout(policy, PROMPTS, group=16, length=40)
    ended = (batch.response_ids == policy.eos_id) & batch.response_mask
    assert ended.any(), "the test needs at least one response that ends"
    for ids, mask, cut in zip(
        batch.response_ids, batch.response_mask, batch.truncated, strict=True
    ):
        kept = ids[mask]
        assert (policy.eos_id in kept.tolist()) != bool(cut)
        assert policy.eos_id not in kept[:-1].tolist()
        assert (ids[~mask] == policy.pad_id).all()


def test_sampling_follows_the_distribution() -> None:
    logits = torch.tensor([0.0, -1.0, float("-inf"), 2.0]).expand(100_000, 4)
    uniforms = torch.linspace(0, 1, 100_001, dtype=torch.float64)[:-1]
    token, logprob = sample_tokens(logits, uniforms)
    expected = logits[0].softmax(-1)
    shares = torch.bincount(token, minlength=4) / len(token)
    torch.testing.assert_close(shares, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(logprob, expected.log()[token])


def test_a_uniform_that_rounds_to_one_never_reaches_an_impossible_token() -> None:
    logits = torch.tensor([[1.0, 0.0, float("-inf")]])
    token, _ = sample_tokens(logits, torch.ones(1, dtype=torch.float64))
    assert token.item() == 1


def test_noise_is_a_function_of_its_address_alone() -> None:
    def noise(prompts: range, step: int = 0, purpose: str = "old") -> torch.Tensor:
        source = PassNoise(
            std=0.5, seed=1, step=step, purpose=purpose, prompts=prompts, group_size=2
        )
        rows = len(prompts) * 2
        return source.for_responses()(1, torch.zeros(rows * 3, 4)).view(rows, 3, 4)

    everyone = noise(range(4))
    assert torch.equal(everyone[4:], noise(range(2, 4)))
    assert not torch.equal(everyone, noise(range(4), step=1))
    assert not torch.equal(everyone, noise(range(4), purpose="update0"))
    assert everyone.std().item() == pytest.approx(0.5, rel=0.3)


def test_noise_read_token_by_token_is_noise_read_at_once() -> None:
    source = PassNoise(std=1.0, seed=1, step=0, purpose="rollout", prompts=range(2), group_size=2)
    at_once = source.for_responses()(0, torch.zeros(4 * 3, 5)).view(4, 3, 5)
    draw = source.for_responses()
    by_token = torch.stack([draw(0, torch.zeros(4, 5)) for _ in range(3)], dim=1)
    assert torch.equal(at_once, by_token)
    sequence = source.for_sequences(prompt_length=2)(0, torch.zeros(4 * 5, 5)).view(4, 5, 5)
    assert torch.equal(sequence[:, 2:], at_once)
    assert torch.equal(sequence[0, :2], sequence[1, :2])  # one prompt, one noise


def test_hidden_noise_is_the_same_while_sampling_and_while_scoring(policy: Policy) -> None:
    noise = PassNoise(
        std=0.0, hidden_std=0.5, seed=1, step=0, purpose="one", prompts=range(2), group_size=3
    )
    draws = torch.rand(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batch = generate(policy, PROMPTS[:2], draws, noise=noise)
    with torch.no_grad():
        scored = response_pass(policy, batch, ForwardOptions(noise=noise)).logprobs
        clean = response_pass(policy, batch, ForwardOptions()).logprobs
    mask = batch.response_mask
    torch.testing.assert_close(scored[mask], batch.rollout_logprobs[mask], atol=1e-4, rtol=0)
    assert (clean - scored)[mask].abs().max() > 1e-2, "the noise must matter"


def test_a_checkpoint_folder_loads_as_it_was_saved(policy: Policy, tmp_path) -> None:  # type: ignore[no-untyped-def]
    policy.model.save_pretrained(tmp_path / "model")
    policy.tokenizer.save_pretrained(tmp_path / "model")
    again = build_policy(ModelConfig(checkpoint=str(tmp_path / "model")), ALPHABET)
    batch = rollout(policy, PROMPTS)
    with torch.no_grad():
        before = response_pass(policy, batch, ForwardOptions()).logprobs
        after = response_pass(again, batch, ForwardOptions()).logprobs
    assert torch.equal(before, after)
    assert again.decode(batch.response_ids) == policy.decode(batch.response_ids)


def test_a_foreign_folder_is_refused(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=r"checkpoint=.*no config\.json"):
        build_policy(ModelConfig(checkpoint=str(tmp_path)), ALPHABET)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe"}')
    with pytest.raises(ConfigError, match="cannot be loaded"):
        build_policy(ModelConfig(checkpoint=str(tmp_path)), ALPHABET)


def test_every_character_is_one_token() -> None:
    tokenizer = tokenizer_of(ALPHABET)
    ids = tokenizer("12=9", add_special_tokens=False)["input_ids"]
    assert len(ids) == 4
    assert tokenizer.decode(ids) == "12=9"


def test_a_checkpoint_that_does_not_fit_its_own_config_is_refused(
    policy: Policy, tmp_path: Path
) -> None:
    policy.model.save_pretrained(tmp_path)
    policy.tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for words, why in ((99, "cannot be loaded"), (None, "cannot be loaded")):
        changed = config if words is None else config | {"vocab_size": words}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        if words is None:
            weights = tmp_path / "model.safetensors"
            weights.write_bytes(weights.read_bytes()[:-100])
        with pytest.raises(ConfigError, match=why):
            build_policy(ModelConfig(checkpoint=str(tmp_path)), ALPHABET)
