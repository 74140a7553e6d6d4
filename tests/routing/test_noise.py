"""Router noise: the choice is noisy, the weights are clean."""

import pytest
import torch
from routes import record
from torch import Tensor
from torch.nn import functional as F

from moe_rl.replay_check.families import build_family
from moe_rl.routing import find_routers, record_routing, replay_routing, router_noise

SOFTMAX = ["qwen3_moe", "olmoe", "mixtral"]


def gaussian(scale: float, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)

    def draw(layer: int, logits: Tensor) -> Tensor:
        return scale * torch.randn(logits.shape, generator=generator)

    return draw


@pytest.mark.parametrize("family", [*SOFTMAX, "gpt_oss", "llama4_text"])
def test_no_noise_changes_nothing(build, tokens, family) -> None:
    model = build(family)
    with torch.no_grad():
        plain = model(tokens).logits
        with router_noise(model, lambda layer, logits: torch.zeros_like(logits)):
            assert torch.equal(model(tokens).logits, plain)


# Of the first four the block holds the correction bias; Inkling's router scores shared experts too.
@pytest.mark.parametrize("family", ["afmoe", "hy_v3", "lfm2_moe", "minimax_m2", "inkling_text"])
def test_noise_goes_into_a_choice_that_keeps_its_bias(tokens, family) -> None:
    model = build_family(family)
    with torch.no_grad(), record_routing(model) as plain:
        model(tokens)

    def silent(layer: int, logits: Tensor) -> Tensor:
        return torch.zeros_like(logits)

    with torch.no_grad(), router_noise(model, silent), record_routing(model) as same:
        model(tokens)
    assert torch.equal(same.routed_experts, plain.routed_experts)
    with torch.no_grad(), router_noise(model, gaussian(3.0)), record_routing(model) as other:
        model(tokens)
    assert not torch.equal(other.routed_experts, plain.routed_experts)


@pytest.mark.parametrize("family", SOFTMAX)
def test_the_choice_is_the_topk_of_noisy_logits_and_is_recorded(build, tokens, family) -> None:
    model, drawn = build(family), {}
    noise = gaussian(1.0)

    def draw(layer: int, logits: Tensor) -> Tensor:
        assert logits.shape == (28, 8)
        assert not logits.requires_grad
        drawn[layer] = noise(layer, logits)
        return drawn[layer]

    with router_noise(model, draw), record_routing(model, router_logits=True) as recorded:
        model(tokens)
    noisy = recorded.router_logits + torch.stack([drawn[0], drawn[1]], dim=1).view(4, 7, 2, 8)
    assert torch.equal(recorded.routed_experts.long(), noisy.topk(2, dim=-1).indices)
    assert not torch.equal(recorded.routed_experts, record(model, tokens))


@pytest.mark.parametrize("family", SOFTMAX)
def test_weights_are_gathered_from_clean_scores(build, tokens, family) -> None:
    model, seen = build(family), {}
    router = find_routers(model)[0].module

    def keep(module, args, output) -> None:
        seen.update(hidden=args[0], weights=output[1], ids=output[2])

    handle = router.register_forward_hook(keep)
    with router_noise(model, gaussian(3.0)):
        model(tokens)
    handle.remove()
    scores = F.linear(seen["hidden"].reshape(-1, 32), router.weight).softmax(-1)
    expected = scores.gather(-1, seen["ids"])
    if family != "olmoe":
        expected = expected / expected.sum(-1, keepdim=True)
    assert torch.allclose(seen["weights"], expected)
    (pull,) = torch.autograd.grad(seen["weights"][:, 0].sum(), router.weight)
    assert pull.abs().sum() > 0


def test_the_same_draws_give_the_same_forward(model, tokens) -> None:
    def run(seed: int) -> Tensor:
        with torch.no_grad(), router_noise(model, gaussian(1.0, seed)):
            return model(tokens).logits

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


def test_the_noisy_choice_replayed_without_noise_is_the_noisy_forward(model, tokens) -> None:
    with torch.no_grad():
        with router_noise(model, gaussian(1.0)), record_routing(model) as recorded:
            noisy = model(tokens).logits
        with replay_routing(model, recorded.routed_experts):
            assert torch.equal(model(tokens).logits, noisy)


@pytest.mark.parametrize("noise_is_outside", [True, False])
def test_replayed_ids_win_and_the_noisy_choice_is_live(model, tokens, noise_is_outside) -> None:
    routes = record(model, tokens).flip(0)
    routes[1] = -1
    contexts = [lambda: router_noise(model, gaussian(1.0)), lambda: replay_routing(model, routes)]
    outer, inner = contexts if noise_is_outside else contexts[::-1]
    with torch.no_grad(), outer() as a, inner() as b, record_routing(model) as used:
        model(tokens)
    live = (b if noise_is_outside else a).live_routed_experts
    recorded = (routes >= 0).all(dim=-1)
    assert torch.equal(used.routed_experts[recorded], routes[recorded])
    assert torch.equal(used.routed_experts[~recorded], live[~recorded])
    assert not torch.equal(live[:, :, 0], record(model, tokens)[:, :, 0])


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2"])
def test_groups_and_correction_biases_see_the_noisy_logits(build, tokens, family) -> None:
    """The noisy choice is the one of a router whose product was noisy from the start."""
    model = build(family)
    routers = [router.module for router in find_routers(model)]
    noise = {layer: gaussian(2.0, seed=layer) for layer in range(2)}
    with router_noise(model, lambda layer, logits: noise[layer](layer, logits)):
        noisy = record(model, tokens)
    plain = record(model, tokens)
    assert not torch.equal(noisy, plain)
    again = [gaussian(2.0, seed=layer)(layer, torch.empty(28, 8)) for layer in range(2)]

    def shifted(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        product = linear(hidden, weight, bias)
        return product + again[0] if weight is routers[0].weight else product

    linear = F.linear
    # The first layer alone: the inputs of the second depend on what the first did.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "linear", shifted)
        expected = record(model, tokens)
    assert torch.equal(noisy[:, :, 0], expected[:, :, 0])


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2"])
def test_weights_of_a_noisy_choice_in_groups_are_clean(build, tokens, family) -> None:
    model = build(family)
    with torch.no_grad(), router_noise(model, gaussian(2.0)), record_routing(model) as recorded:
        noisy = model(tokens).logits
    with torch.no_grad(), replay_routing(model, recorded.routed_experts):
        assert torch.equal(model(tokens).logits, noisy)


def test_nested_noise_is_refused(model) -> None:
    with (
        router_noise(model, gaussian(1.0)),
        pytest.raises(ValueError, match="another noise context is open"),
        router_noise(model, gaussian(1.0)),
    ):
        pass
