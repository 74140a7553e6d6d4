"""Fused layers and the CPU experts change the time, never the values of stock transformers."""

from types import MethodType
from typing import Any

import pytest
import torch
from transformers import DynamicCache, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

from moe_rl.experts import choose_experts
from moe_rl.fused_layers import new_cache, restore_layers, use_fused_layers


def stock(dtype: torch.dtype = torch.float64, experts: int = 6, top_k: int = 2) -> Any:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=19,
        hidden_size=16,
        intermediate_size=12,
        moe_intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=True,
        pad_token_id=None,
        eos_token_id=None,
        bos_token_id=None,
    )
    model = Qwen3MoeForCausalLM(config).to(dtype).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    model.set_experts_implementation("eager")
    return model


def exact(model: Any) -> Any:
    """Stock norms compute in float32 whatever the input; the reference must not."""

    def norm(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    for module in model.modules():
        if isinstance(module, Qwen3MoeRMSNorm):
            module.forward = MethodType(norm, module)
    return model


def fused(model: Any) -> Any:
    model.set_experts_implementation("cpu_sorted")
    assert use_fused_layers(model)
    return model


def forward_and_gradients(model: Any, ids: torch.Tensor, **kwargs: Any) -> list[torch.Tensor]:
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False, **kwargs).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (logits * weights.to(logits.dtype)).sum().backward()
    gradients = [p.grad for p in model.parameters()]
    assert all(g is not None for g in gradients)
    return [logits.detach(), *gradients]


@pytest.mark.parametrize(("experts", "top_k"), [(6, 2), (6, 1), (2, 2), (20, 3)])
def test_values_and_gradients_are_those_of_stock_layers(experts: int, top_k: int) -> None:
    ids = torch.randint(0, 19, (3, 7), generator=torch.Generator().manual_seed(2))
    ours = forward_and_gradients(fused(stock(experts=experts, top_k=top_k)), ids)
    theirs = forward_and_gradients(exact(stock(experts=experts, top_k=top_k)), ids)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_float32_is_within_rounding_of_stock() -> None:
    ids = torch.randint(0, 19, (3, 7), generator=torch.Generator().manual_seed(2))
    ours = forward_and_gradients(fused(stock(torch.float32)), ids)
    theirs = forward_and_gradients(stock(torch.float32), ids)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_left_padding_is_masked_as_by_stock_layers() -> None:
    ids = torch.randint(0, 19, (2, 6), generator=torch.Generator().manual_seed(3))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        ours, theirs = (
            m(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
            for m in (fused(stock()), exact(stock()))
        )
    torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], rtol=1e-9, atol=1e-9)


def grouped(model: Any, prompts: torch.Tensor, responses: torch.Tensor, cache: Any) -> Any:
    model.model(input_ids=prompts, past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(len(responses) // len(prompts))
    return model.model(input_ids=responses, past_key_values=cache, use_cache=True).last_hidden_state


def test_a_shared_prompt_has_the_gradients_of_its_copies() -> None:
    rng = torch.Generator().manual_seed(4)
    prompts = torch.randint(0, 19, (2, 5), generator=rng)
    responses = torch.randint(0, 19, (6, 4), generator=rng)
    results = []
    for model in (fused(stock()), exact(stock())):
        cache = new_cache(model)
        hidden = grouped(model, prompts, responses, cache)
        hidden.square().sum().backward()
        results.append([hidden.detach(), *(p.grad for p in model.model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_decoding_token_by_token_is_reading_at_once() -> None:
    rng = torch.Generator().manual_seed(5)
    prompts = torch.randint(0, 19, (2, 5), generator=rng)
    responses = torch.randint(0, 19, (6, 30), generator=rng)
    model = fused(stock())
    with torch.no_grad():
        at_once = grouped(model, prompts, responses, new_cache(model))
        cache = new_cache(model)
        model.model(input_ids=prompts, past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(3)
        by_token = [
            model.model(
                input_ids=responses[:, t : t + 1], past_key_values=cache, use_cache=True
            ).last_hidden_state
            for t in range(30)
        ]
        reference = grouped(exact(stock()), prompts, responses, DynamicCache())
    torch.testing.assert_close(torch.cat(by_token, dim=1), at_once, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(at_once, reference, rtol=1e-9, atol=1e-9)


def test_an_expert_without_tokens_gets_a_gradient_of_zero() -> None:
    model = fused(stock(experts=20, top_k=1))
    forward_and_gradients(model, torch.zeros(1, 2, dtype=torch.long))
    gradient = model.model.layers[0].mlp.experts.gate_up_proj.grad
    idle = gradient.flatten(1).abs().sum(1) == 0
    assert 17 <= int(idle.sum()) < 20


def test_frozen_experts_get_no_gradient_and_the_rest_keeps_its_own() -> None:
    ids = torch.randint(0, 19, (3, 7), generator=torch.Generator().manual_seed(2))
    models = (fused(stock()), exact(stock()))
    for model in models:
        model.model.layers[0].mlp.experts.requires_grad_(False)
        model(input_ids=ids, use_cache=False).logits.square().sum().backward()
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)


def test_results_repeat_bitwise() -> None:
    ids = torch.randint(0, 19, (3, 7), generator=torch.Generator().manual_seed(2))
    model = fused(stock(torch.float32))
    first = [t.clone() for t in forward_and_gradients(model, ids)]
    second = forward_and_gradients(model, ids)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_swapping_keeps_names_and_weights_and_can_be_undone() -> None:
    model = stock()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    swapped = use_fused_layers(model)
    assert model.state_dict().keys() == before.keys()
    assert use_fused_layers(model) == []
    assert restore_layers(model) == swapped
    assert not any("forward" in vars(module) for module in model.modules())


def test_an_unknown_experts_backend_lists_the_valid_ones() -> None:
    with pytest.raises(ValueError, match=r"'magic' is unknown.*cpu_sorted"):
        choose_experts("cpu", "magic")
    assert choose_experts("cpu").name == "cpu_sorted"
    assert choose_experts("cuda").name == "grouped_mm"
