"""The CPU fast path leaves to stock code what it does not compute: hooks, half precision, ..."""

import copy

import pytest
import torch
from cpu.models import exact, fused, stock, tokens
from transformers import DynamicCache

from moe_rl.cpu import FastPath
from moe_rl.cpu.group_cache import GroupCache


@pytest.mark.parametrize(
    "name", ["self_attn.q_proj", "self_attn", "post_attention_layernorm", "mlp", "mlp.experts"]
)
def test_a_hook_on_a_submodule_is_called(name: str) -> None:
    ids = torch.arange(6).view(1, 6)
    model = fused(stock())
    expected = model(input_ids=ids, use_cache=False).logits
    calls = []
    hook = model.get_submodule(f"model.layers.1.{name}").register_forward_hook(
        lambda *_: calls.append(1)
    )
    torch.testing.assert_close(
        model(input_ids=ids, use_cache=False).logits, expected, rtol=1e-10, atol=1e-10
    )
    assert calls == [1]
    hook.remove()


def test_the_router_is_called_as_the_module_it_is() -> None:
    model = fused(stock())
    router = model.model.layers[1].mlp.gate
    forward, seen = router.forward, []
    router.forward = lambda hidden: seen.append(hidden.shape) or forward(hidden)
    model(input_ids=torch.arange(6).view(2, 3), use_cache=False)
    assert seen == [torch.Size([6, 16])]


def test_an_adapter_put_on_a_projection_is_not_bypassed() -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    ids = torch.arange(6).view(1, 6)
    models = (fused(stock()), exact(stock()))
    for model in models:
        attention = model.model.layers[0].self_attn
        adapter = Doubled(16, attention.v_proj.out_features, bias=False, dtype=torch.float64)
        adapter.weight = attention.v_proj.weight
        attention.v_proj = adapter
    ours, theirs = (model(input_ids=ids, use_cache=False).logits for model in models)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_weights_changed_while_decoding_are_used() -> None:
    ids, _, responses = tokens(1, 4, 2, 2, padded=False)
    steps = []
    for change_after_prompt in (True, False):
        model = fused(stock())
        norm = model.model.layers[1].input_layernorm.weight
        with torch.no_grad():
            cache = FastPath(model).new_cache()
            model.model(input_ids=ids, past_key_values=cache)
            cache.batch_repeat_interleave(2)
            if not change_after_prompt:
                cache.layers[1]._prepared = None
            norm.mul_(1.5)
            step = model.model(input_ids=responses[:, :1], past_key_values=cache)
        steps.append(step.last_hidden_state)
    assert torch.equal(*steps)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_runs_stock_code(autocast: bool) -> None:
    ids = torch.arange(12).view(2, 6)
    ours, theirs = fused(stock(torch.float32)), stock(torch.float32)
    if not autocast:
        ours, theirs = ours.to(torch.bfloat16), theirs.to(torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, theirs = (m(input_ids=ids, use_cache=False).logits for m in (ours, theirs))
    # Under autocast the norms are computed in float32 by either, in another order.
    size = float(theirs.abs().max())
    torch.testing.assert_close(ours, theirs, rtol=0.05 * autocast, atol=0.05 * size * autocast)


def test_a_foreign_cache_is_filled_as_stock_does() -> None:
    ids = torch.arange(12).view(2, 6)
    caches = []
    for model in (fused(stock()), exact(stock())):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=ids, past_key_values=cache)
        caches.append(cache)
    for ours, theirs in zip(*(cache.layers for cache in caches), strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-9, atol=1e-9)


def test_layers_of_another_family_are_left_alone() -> None:
    from transformers import OlmoeConfig, OlmoeForCausalLM

    model = OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=19,
            hidden_size=16,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_experts=4,
            num_experts_per_tok=2,
            pad_token_id=None,
            eos_token_id=None,
        )
    )
    assert FastPath(model).install() == []
    assert isinstance(FastPath(model).new_cache(), DynamicCache)


def test_a_copy_of_a_fused_model_is_a_fused_model_of_its_own() -> None:
    ids = torch.arange(6).view(1, 6)
    model = fused(stock())
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert isinstance(FastPath(twin).new_cache(), GroupCache)
    expected = fused(stock())(input_ids=ids, use_cache=False).logits
    assert torch.equal(twin(input_ids=ids, use_cache=False).logits, expected)


def test_angles_from_a_table_are_stock_angles_bitwise() -> None:
    model = stock(torch.float32)
    positions = torch.tensor([[0, 3, 3, 700], [1, 2, 255, 256]])
    x = torch.zeros(1)
    expected = model.model.rotary_emb(x, positions)
    rotary = fused(model).model.rotary_emb
    for _ in range(2):  # made, and read again
        for ours, theirs in zip(rotary(x, positions), expected, strict=True):
            assert torch.equal(ours, theirs)
    with torch.no_grad():
        rotary.inv_freq.mul_(2.0)
    assert not torch.equal(rotary(x, positions)[0], expected[0]), "the table outlived its angles"


def test_angles_that_change_with_the_length_are_left_to_stock() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = stock(torch.float32, rope_parameters=rope)  # type: ignore[arg-type]
    fused(model)
    assert "forward" not in vars(model.model.rotary_emb)


def test_layers_are_fused_in_full_precision_on_a_cpu_alone() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert FastPath.choose(cpu, torch.float32).name == "fused"
    for device, dtype, why in ((gpu, torch.float32, "cuda"), (cpu, torch.bfloat16, "bfloat16")):
        choice = FastPath.choose(device, dtype)
        assert choice.name == "stock" and why in choice.reason
    assert FastPath(stock(torch.bfloat16)).install() == []


def test_the_fast_path_keeps_names_and_weights_and_can_be_removed() -> None:
    ids = torch.arange(12).view(2, 6)
    model = stock(torch.float32)
    names, before = model.state_dict().keys(), model(input_ids=ids).logits
    model.model.norm.forward = replaced = model.model.norm.forward  # somebody else's
    path = FastPath(model)
    swapped = path.install()
    assert model.state_dict().keys() == names and "model.norm" not in swapped
    assert path.is_installed() and path.install() == []
    assert path.remove() == swapped
    assert vars(model.model.norm)["forward"] == replaced
    assert torch.equal(model(input_ids=ids).logits, before)


def test_a_group_cache_is_refused_where_it_cannot_be_read() -> None:
    ids = torch.arange(8).view(2, 4)
    with pytest.raises(NotImplementedError, match="pass a DynamicCache"):
        stock().model(input_ids=ids, past_key_values=GroupCache(2))
    model = fused(stock())
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="projections without adapters or hooks"):
        model.model(input_ids=ids, past_key_values=FastPath(model).new_cache())
