"""Somebody's own router is recorded and replayed through one method."""

import pytest
import torch
from torch import Tensor, nn

from moe_rl.routing import find_routers, record_routing, replay_routing, router_noise


class ArgmaxRouter(nn.Module):
    """Chooses one expert after another by argmax, as no top-k does."""

    num_experts, top_k = 6, 2

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, self.num_experts, bias=False)

    def select_experts(self, scores: Tensor) -> Tensor:
        first = scores.argmax(-1, keepdim=True)
        second = scores.scatter(-1, first, -torch.inf).argmax(-1, keepdim=True)
        return torch.cat([second, first], dim=-1)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.proj(hidden).sigmoid()
        ids = self.select_experts(scores)
        return ids, scores.gather(-1, ids)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = ArgmaxRouter()
        self.experts = nn.Parameter(torch.randn(6, 8, 8) / 3)

    def forward(self, hidden: Tensor) -> Tensor:
        ids, weights = self.router(hidden)
        out = torch.einsum("bskij,bsj->bski", self.experts[ids], hidden)
        return hidden + (out * weights.unsqueeze(-1)).sum(2)


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(16, 8)
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


@pytest.fixture
def own() -> Own:
    return Own()


@pytest.fixture
def ids() -> Tensor:
    return torch.arange(10).view(2, 5)


def test_its_own_choice_is_recorded_in_its_order(own, ids) -> None:
    chosen = []
    handle = own.layers[1].router.register_forward_hook(lambda m, a, out: chosen.append(out[0]))
    with torch.no_grad(), record_routing(own) as recorded:
        own(ids)
    handle.remove()
    assert [tap.name for tap in find_routers(own)] == ["layers.0.router", "layers.1.router"]
    assert recorded.routed_experts.shape == (2, 5, 2, 2)
    assert torch.equal(recorded.routed_experts[:, :, 1].long(), chosen[0])


def test_replaying_its_own_record_changes_nothing(own, ids) -> None:
    plain = own(ids)
    with record_routing(own) as recorded:
        own(ids)
    with replay_routing(own, recorded.routed_experts) as replayed:
        again = own(ids)
    assert torch.equal(plain, again)
    assert torch.equal(replayed.live_routed_experts, recorded.routed_experts)


def test_foreign_ids_take_weights_from_the_full_scores_and_the_router_learns(own, ids) -> None:
    draws = torch.rand(2, 5, 2, 6, generator=torch.Generator().manual_seed(1))
    routes = draws.topk(2, dim=-1).indices.to(torch.int16)
    weights = []
    handle = own.layers[0].router.register_forward_hook(lambda m, a, out: weights.append(out))
    with replay_routing(own, routes) as replayed:
        own(ids).square().sum().backward()
    handle.remove()
    scores = own.layers[0].router.proj(own.embed(ids)).sigmoid()
    used, got = weights[0]
    assert torch.equal(used, routes[:, :, 0].long())
    assert torch.allclose(got, scores.gather(-1, used))
    assert not torch.equal(replayed.live_routed_experts, routes)
    for layer in own.layers:
        assert layer.router.proj.weight.grad.abs().sum() > 0


def test_the_method_is_its_own_again_afterwards(own, ids) -> None:
    with record_routing(own):
        own(ids)
    assert all("select_experts" not in layer.router.__dict__ for layer in own.layers)


def test_a_forward_that_does_not_call_the_method_is_refused(own, ids) -> None:
    router = own.layers[0].router
    router.forward = lambda hidden: (torch.zeros(2, 5, 2).long(), torch.ones(2, 5, 2))
    with record_routing(own), pytest.raises(ValueError, match="did not call select_experts over 6"):
        own(ids)


def test_its_method_chooses_under_noise_and_its_weights_stay_clean(own, ids) -> None:
    noise = torch.randn(2, 2, 5, 6, generator=torch.Generator().manual_seed(2))
    router, seen = own.layers[0].router, []
    handle = router.register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad(), router_noise(own, lambda layer, logits: noise[layer]):
        own(ids)
    handle.remove()
    logits = router.proj(own.embed(ids))
    used, weights = seen[-1]
    assert torch.equal(used, router.select_experts((logits + noise[0]).sigmoid()))
    assert torch.allclose(weights, logits.sigmoid().gather(-1, used))


class Actor(nn.Module):
    """A trainer's wrapper, as many have one."""

    def __init__(self, policy: Own) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.policy(input_ids)


def test_contexts_on_a_wrapper_and_on_what_it_wraps_are_refused(own, ids) -> None:
    actor = Actor(own)
    with record_routing(actor) as outer:
        refused = pytest.raises(ValueError, match="on Actor, and this one is opened on Own")
        with refused, record_routing(own):
            own(ids)
        actor(ids)
    with record_routing(own) as inner:
        own(ids)
    assert torch.equal(outer.routed_experts, inner.routed_experts)
