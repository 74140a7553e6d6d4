"""The CPU fast path changes the time, never the values, of stock transformers."""

from types import MethodType
from typing import Any

import pytest
import torch
from cpu.models import exact, forward_and_gradients, fused, stock, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_rl.cpu import FastPath


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("experts", "top_k"), [(6, 2), (2, 2)])
def test_values_and_gradients_are_those_of_stock_layers(
    experts: int, top_k: int, dtype: torch.dtype
) -> None:
    ids = torch.randint(0, 19, (3, 7), generator=torch.Generator().manual_seed(2))
    ours = forward_and_gradients(fused(stock(dtype, experts, top_k)), ids)
    theirs = forward_and_gradients(exact(stock(dtype, experts, top_k)), ids)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    for a, b in zip(ours, theirs, strict=True):
        scale = max(1.0, float(b.abs().max()))
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * scale)


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
        cache = FastPath(model).new_cache()
        hidden = grouped(model, prompts, responses, cache)
        hidden.square().sum().backward()
        results.append([hidden.detach(), *(p.grad for p in model.model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


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


def whole_sequences(
    model: Any, prompts: torch.Tensor, mask: torch.Tensor, responses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states of prompts [P, Sp, H] and responses [B, T, H], every sequence read whole."""
    group = len(responses) // len(prompts)
    ids = torch.cat([prompts.repeat_interleave(group, dim=0), responses], dim=1)
    seen = torch.nn.functional.pad(
        mask.long().repeat_interleave(group, dim=0), (0, responses.shape[1]), value=1
    )
    hidden = model.model(
        input_ids=ids,
        attention_mask=seen,
        position_ids=(seen.cumsum(1) - 1).clamp(min=0),
        use_cache=False,
    ).last_hidden_state
    return hidden[::group, : prompts.shape[1]], hidden[:, prompts.shape[1] :]


def exact_routers(model: Any) -> Any:
    """Stock routers take their softmax in float32 whatever the input; sums in another order may
    then round to another gate weight."""

    def choose(self: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = torch.nn.functional.linear(hidden.reshape(-1, self.hidden_dim), self.weight)
        weights, index = logits.softmax(-1).topk(self.top_k)
        return logits, weights / weights.sum(-1, keepdim=True), index

    for layer in model.model.layers:
        layer.mlp.gate.forward = MethodType(choose, layer.mlp.gate)
    return model


def loss(prompt: torch.Tensor, response: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A loss of all hidden states that count."""
    return (prompt[mask] ** 3).sum() + (response**2 * torch.arange(1, 17)).sum()


@settings(max_examples=10, deadline=None)
@given(
    prompts=st.integers(1, 3),
    prompt_length=st.integers(1, 5),
    group=st.integers(1, 3),
    length=st.integers(1, 5),
    kv_heads=st.integers(1, 2),
    repeats=st.integers(1, 3),
    half_head=st.integers(1, 3),
    padded=st.booleans(),
)
def test_one_pass_has_the_values_and_gradients_of_whole_sequences(
    prompts: int,
    prompt_length: int,
    group: int,
    length: int,
    kv_heads: int,
    repeats: int,
    half_head: int,
    padded: bool,
) -> None:
    sizes = {
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * repeats,
        "head_dim": 2 * half_head,
    }
    ids, mask, responses = tokens(prompts, prompt_length, group, length, padded)
    ours, theirs = exact_routers(fused(stock(**sizes))), exact_routers(exact(stock(**sizes)))
    results = [
        FastPath(ours).read_in_one_pass(ids, responses, mask if padded else None),
        whole_sequences(theirs, ids, mask, responses),
    ]
    gradients = []
    for model, (prompt, response) in zip((ours, theirs), results, strict=True):
        loss(prompt, response, mask).backward()
        gradients.append([p.grad for p in model.model.parameters()])
    torch.testing.assert_close(results[0][0][mask], results[1][0][mask], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-9, atol=1e-9)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("with_graph", [False, True])
def test_padded_prompts_in_a_group_cache_are_those_of_whole_sequences(with_graph: bool) -> None:
    ids, mask, responses = tokens(2, 4, 3, 5, padded=True)
    model = fused(stock())
    cache = FastPath(model).new_cache()
    rows = mask.long().repeat_interleave(3, dim=0)
    chunks = [responses] if with_graph else list(responses.split(1, dim=1))
    hidden = []
    with torch.set_grad_enabled(with_graph):
        model.model(
            input_ids=ids,
            attention_mask=mask.long(),
            position_ids=(mask.long().cumsum(1) - 1).clamp(min=0),
            past_key_values=cache,
        )
        cache.batch_repeat_interleave(3)
        for chunk in chunks:
            done = cache.get_seq_length() - ids.shape[1]
            steps = torch.arange(done, done + chunk.shape[1])
            output = model.model(
                input_ids=chunk,
                attention_mask=torch.nn.functional.pad(rows, (0, int(steps[-1]) + 1), value=1),
                position_ids=rows.sum(1, keepdim=True) + steps,
                past_key_values=cache,
            )
            hidden.append(output.last_hidden_state)
        _, theirs = whole_sequences(exact(stock()), ids, mask, responses)
    torch.testing.assert_close(torch.cat(hidden, dim=1), theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sizes", [[40], [1] * 40, [1, 15, 3, 20, 1]])
def test_responses_read_in_any_pieces_are_those_read_at_once(sizes: list[int]) -> None:
    ids, mask, responses = tokens(2, 4, 3, 40, padded=False)
    model = fused(stock())
    with torch.no_grad():
        cache = FastPath(model).new_cache()
        model.model(input_ids=ids, past_key_values=cache)
        cache.batch_repeat_interleave(3)
        hidden = [
            model.model(input_ids=piece, past_key_values=cache).last_hidden_state
            for piece in responses.split(sizes, dim=1)
        ]
        _, theirs = whole_sequences(exact(stock()), ids, mask, responses)
    torch.testing.assert_close(torch.cat(hidden, dim=1), theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("padded", [False, True])
def test_scores_too_large_to_exponentiate_are_those_of_stock(padded: bool) -> None:
    models = (fused(stock(torch.float32)), stock(torch.float32))
    for model in models:
        for layer in model.model.layers:
            layer.self_attn.q_norm.weight.data.mul_(40)
            layer.self_attn.k_norm.weight.data.mul_(40)
    ids, mask, responses = tokens(2, 5, 3, 4, padded)
    with torch.no_grad():
        seen = mask if padded else None
        prompt, response = FastPath(models[0]).read_in_one_pass(ids, responses, seen)
        theirs = whole_sequences(models[1], ids, mask, responses)
    assert bool(prompt.isfinite().all())
    torch.testing.assert_close(prompt[mask], theirs[0][mask], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(response, theirs[1], rtol=1e-3, atol=1e-3)


def checkpoint(model: Any, reentrant: bool) -> None:
    prefix = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{prefix}_checkpointing_enable")({"use_reentrant": reentrant})


def test_a_checkpointed_layer_is_computed_again_by_the_backward() -> None:
    model = fused(stock()).train()
    checkpoint(model, reentrant=False)
    router = model.model.layers[1].mlp.gate
    forward, calls = router.forward, []
    router.forward = lambda hidden: calls.append(1) or forward(hidden)
    out = model(input_ids=torch.arange(6).view(1, 6), use_cache=False).logits.sum()
    assert len(calls) == 1
    out.backward()
    assert len(calls) == 2


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("one_pass", [False, True])
def test_gradient_checkpointing_changes_no_gradient(one_pass: bool, reentrant: bool) -> None:
    ids, mask, responses = tokens(2, 4, 2, 3, padded=False)
    gradients = []
    for checkpointing in (False, True):
        model = fused(stock()).train()
        if checkpointing:
            checkpoint(model, reentrant)
        # Reentrant checkpointing gives parameters no gradient unless its input has one.
        model.enable_input_require_grads()
        if one_pass:
            prompt, response = FastPath(model).read_in_one_pass(ids, responses)
            loss(prompt, response, mask).backward()
        else:
            model(input_ids=ids, use_cache=False).logits.square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
