"""Models that somebody has wrapped: compiled, sharded, with adapters."""

import contextlib
import copy

import pytest
import torch
from routes import foreign
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from moe_rl.routing import find_routers, record_routing, replay_routing


@pytest.mark.parametrize("what", ["model", "layer"])
def test_a_compiled_model_is_refused_by_name(model, what) -> None:
    if what == "layer":
        model.model.layers[1].compile(backend="eager")
        compiled, name = model, "'model.layers.1'|model.layers.1"
    else:
        compiled, name = torch.compile(model, backend="eager"), "OptimizedModule"
    with pytest.raises(ValueError, match=rf"({name}).* is compiled by torch.compile"):
        find_routers(compiled)


def test_a_compiled_part_without_a_router_is_no_matter(model, tokens) -> None:
    model.model.layers[0].self_attn.compile(backend="eager")
    assert len(find_routers(model)) == 2


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_a_sharded_model_replays_as_the_whole_one(build, tokens, family, tmp_path) -> None:
    """FSDP2 changes the classes of modules and gathers their weights around each forward."""
    model = build(family)
    routes = foreign(model, tokens.shape)
    sharded = copy.deepcopy(model)
    with replay_routing(model, routes):
        model(tokens, labels=tokens).loss.backward()
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        mesh = distributed.init_device_mesh("cpu", (1,))
        for layer in sharded.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        with replay_routing(sharded, routes), record_routing(sharded) as used:
            sharded(tokens, labels=tokens).loss.backward()
        assert torch.equal(used.routed_experts, routes)
        for (name, own), other in zip(model.named_parameters(), sharded.parameters(), strict=True):
            gradient = other.grad
            whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
            assert torch.allclose(own.grad, whole, rtol=1e-4, atol=1e-6), name
    finally:
        distributed.destroy_process_group()


def test_adapters_on_attention_and_experts_learn_under_replay(model, tokens) -> None:
    from peft import LoraConfig, get_peft_model

    routes = foreign(model, tokens.shape)
    names = [tap.name for tap in find_routers(model)]
    config = LoraConfig(
        r=2,
        target_modules=["q_proj", "v_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    adapted = get_peft_model(model, config)
    assert [tap.name for tap in find_routers(adapted)] == names
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    with torch.no_grad():
        plain = adapted(tokens).logits
        with record_routing(adapted) as recorded:
            adapted(tokens)
        with replay_routing(adapted, recorded.routed_experts):
            assert torch.equal(adapted(tokens).logits, plain)
    with replay_routing(adapted, routes), record_routing(adapted) as used:
        adapted(tokens, labels=tokens).loss.backward()
    assert torch.equal(used.routed_experts, routes)
    learnt = [p for name, p in adapted.named_parameters() if p.requires_grad]
    assert len(learnt) == 2 * 2 * 4  # layers, matrices A and B, adapted weights
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learnt)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_adapters_on_routers_learn_under_replay(build, tokens, family) -> None:
    """PEFT keeps the adapted weight for a forward; group-limited routers are called twice in it."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["o_proj"], target_parameters=["mlp.gate.weight"])
    adapted = get_peft_model(build(family), config)
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    with torch.no_grad(), record_routing(adapted) as recorded:
        adapted(tokens)
    gradients = []
    for replayed in (False, True):
        adapted.zero_grad()
        with contextlib.ExitStack() as stack:
            if replayed:
                stack.enter_context(replay_routing(adapted, recorded.routed_experts))
            adapted(tokens).logits.pow(2).mean().backward()
        gradients.append({n: p.grad for n, p in adapted.named_parameters() if "gate.lora" in n})
    assert len(gradients[0]) == 4
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0 and torch.equal(gradients[1][name], gradient), name


def test_routers_that_peft_copies_whole_are_refused(model) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["gate"])
    with pytest.raises(ValueError, match=r"two copies of the router .*modules_to_save"):
        find_routers(get_peft_model(model, config))
