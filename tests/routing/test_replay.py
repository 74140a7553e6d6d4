"""Replaying: the laws of routing replay."""

import copy

import pytest
import torch
from routes import clean, foreign, record
from torch import Tensor
from torch.nn import functional as F

from moe_rl.routing import find_routers, record_routing, replay_routing

KINDS = ["qwen3_moe", "olmoe", "mixtral", "gpt_oss", "deepseek_v3", "deepseek_v2", "llama4_text"]


def gradients(model) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def sets(ids: Tensor) -> Tensor:
    return ids.sort(dim=-1).values


@pytest.mark.parametrize("family", KINDS)
def test_replaying_own_routes_changes_nothing(build, tokens, family) -> None:
    model = build(family)
    routes = record(model, tokens)
    plain = model(tokens, labels=tokens)
    plain.loss.backward()
    expected = gradients(model)
    model.zero_grad()
    with replay_routing(model, routes) as replayed:
        again = model(tokens, labels=tokens)
        again.loss.backward()
    assert torch.equal(plain.logits, again.logits)
    assert torch.equal(sets(replayed.live_routed_experts), sets(routes))
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize("family", KINDS)
def test_foreign_routes_are_taken_and_the_router_learns(build, tokens, family) -> None:
    model = build(family)
    routes = foreign(model, tokens.shape)
    with replay_routing(model, routes), record_routing(model) as used:
        model(tokens, labels=tokens).loss.backward()
    assert torch.equal(used.routed_experts, routes)
    for tap in find_routers(model):
        assert all(p.grad is None or p.grad.abs().sum() > 0 for p in tap.module.parameters())
        assert tap.module.weight.grad.abs().sum() > 0


def normalised(weights: Tensor) -> Tensor:
    return weights / weights.sum(dim=-1, keepdim=True)


FORMULAS = {
    "qwen3_moe": lambda x, e: normalised(x.softmax(-1).gather(-1, e)),
    "olmoe": lambda x, e: x.softmax(-1).gather(-1, e),
    "mixtral": lambda x, e: normalised(x.softmax(-1).gather(-1, e)),
    "gpt_oss": lambda x, e: x.gather(-1, e).softmax(-1),
    "deepseek_v3": lambda x, e: normalised(x.sigmoid().gather(-1, e)) * 2.5,
    "deepseek_v2": lambda x, e: x.softmax(-1).gather(-1, e),
}


@pytest.mark.parametrize("family", FORMULAS)
def test_foreign_weights_and_router_gradients_follow_the_formula(build, tokens, family) -> None:
    model = build(family)
    routes = foreign(model, tokens.shape)
    tap = find_routers(model)[1]
    seen: dict[str, Tensor] = {}

    def keep(module, args, output) -> None:
        seen["hidden"], seen["weights"] = args[0].reshape(-1, 32), output[1]

    handle = tap.module.register_forward_hook(keep)
    with replay_routing(model, routes):
        model(tokens)
    handle.remove()
    pull = torch.arange(1.0, 3.0)  # unequal, or normalised weights have no gradient
    (gradient,) = torch.autograd.grad((seen["weights"] * pull).sum(), tap.module.weight)

    weight = tap.module.weight.detach().double().requires_grad_()
    bias = getattr(tap.module, "bias", None)
    logits = F.linear(
        seen["hidden"].detach().double(), weight, None if bias is None else bias.double()
    )
    expected = FORMULAS[family](logits, routes[:, :, 1].reshape(-1, 2).long())
    (by_hand,) = torch.autograd.grad((expected * pull).sum(), weight)
    assert torch.allclose(seen["weights"].double(), expected, rtol=1e-5, atol=1e-6)
    assert by_hand.abs().sum() > 0
    assert torch.allclose(gradient.double(), by_hand, rtol=1e-4, atol=1e-5)


def qwen3_moe_layer(mlp, hidden: Tensor, ids: Tensor) -> Tensor:
    """A Qwen3-MoE block that is told its experts, written out token by token."""
    scores = F.linear(hidden, mlp.gate.weight).softmax(-1)
    out = []
    for h, r, chosen in zip(hidden, scores, ids.tolist(), strict=True):
        weights = torch.stack([r[e] for e in chosen])
        weights = weights / weights.sum()
        parts = []
        for e in chosen:
            gate, up = (mlp.experts.gate_up_proj[e] @ h).chunk(2)
            parts.append(mlp.experts.down_proj[e] @ (F.silu(gate) * up))
        out.append(sum(w * part for w, part in zip(weights, parts, strict=True)))
    return torch.stack(out)


def test_replay_equals_an_independent_model_that_is_told_its_experts(model, tokens) -> None:
    routes = foreign(model, tokens.shape)
    with replay_routing(model, routes):
        loss = model(tokens, labels=tokens).loss
    loss.backward()
    expected = gradients(model)
    model.zero_grad()

    for layer, tap in enumerate(find_routers(model)):
        mlp = model.model.layers[layer].mlp
        ids = routes[:, :, layer].reshape(-1, tap.top_k)

        def told(hidden: Tensor, mlp=mlp, ids=ids) -> Tensor:
            return qwen3_moe_layer(mlp, hidden.flatten(0, 1), ids).view_as(hidden)

        mlp.forward = told
    by_hand = model(tokens, labels=tokens).loss
    by_hand.backward()
    assert torch.allclose(loss, by_hand, rtol=1e-5)
    for name, gradient in gradients(model).items():
        assert torch.allclose(gradient, expected[name], rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_minus_one_means_the_live_choice(build, tokens, family) -> None:
    model = build(family)
    routes = foreign(model, tokens.shape)
    routes[:, 2:] = -1  # attention is causal: what is live must not depend on what follows
    routes[1] = -1
    routes[2, 0, 0, 1] = -1  # one missing id makes its token live at that layer, not at others
    own = record(model, tokens)
    with torch.no_grad(), replay_routing(model, routes) as replayed, record_routing(model) as used:
        model(tokens)
    live = (routes < 0).any(dim=-1)
    assert torch.equal(replayed.replayed, ~live)
    assert torch.equal(sets(used.routed_experts)[live], sets(replayed.live_routed_experts)[live])
    assert torch.equal(used.routed_experts[~live], routes[~live])
    assert torch.equal(used.routed_experts[1], own[1])
    assert torch.equal(used.routed_experts[2, 0, 0], own[2, 0, 0])


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "deepseek_v2"])
def test_the_live_choice_is_known_while_replaying(build, tokens, family) -> None:
    model = build(family)
    own = record(model, tokens)
    routes = foreign(model, tokens.shape)
    with torch.no_grad(), replay_routing(model, routes, router_logits=True) as replayed:
        model(tokens)
    live = replayed.live_routed_experts
    # Nothing is replayed below the first layer, so there the live choice is the old record.
    assert torch.equal(sets(live[:, :, 0]), sets(own[:, :, 0]))
    assert not torch.equal(sets(live), sets(routes))
    if family == "qwen3_moe":
        assert torch.equal(sets(live), sets(replayed.router_logits.topk(2).indices.short()))


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_every_integer_record_replays(model, tokens, dtype) -> None:
    routes = foreign(model, tokens.shape)
    with torch.no_grad(), replay_routing(model, routes.to(dtype)), record_routing(model) as used:
        model(tokens)
    assert torch.equal(used.routed_experts, routes)


def test_prefill_and_decode_take_the_rows_of_the_record(model, tokens) -> None:
    routes = foreign(model, tokens.shape)
    with torch.no_grad(), replay_routing(model, routes):
        whole = model(tokens).logits
    with torch.no_grad(), replay_routing(model, routes) as replayed:
        first = model(tokens[:, :4], use_cache=True)
        rest = [
            model(tokens[:, i : i + 1], past_key_values=first.past_key_values) for i in range(4, 7)
        ]
    steps = torch.cat([first.logits, *(step.logits for step in rest)], dim=1)
    assert torch.allclose(steps, whole, atol=1e-5)
    assert replayed.live_routed_experts.shape == routes.shape


def test_chunks_of_rows_take_their_own_rows_and_begin_again(model, tokens) -> None:
    routes = foreign(model, tokens.shape)
    with torch.no_grad(), replay_routing(model, routes) as replayed:
        whole = model(tokens).logits
        live = replayed.live_routed_experts
        for _ in range(2):
            parts = [model(chunk).logits for chunk in tokens.split([1, 2, 1])]
            assert torch.allclose(torch.cat(parts), whole, atol=1e-6)
    assert torch.equal(replayed.live_routed_experts, live)


def test_generation_runs_on_beyond_the_record(model, tokens) -> None:
    routes = foreign(model, tokens.shape)
    with replay_routing(model, routes) as replayed, record_routing(model) as used:
        out = model.generate(tokens, max_new_tokens=4, do_sample=False)
    assert out.shape == (4, 11)
    assert torch.equal(used.routed_experts[:, :7], routes)
    assert torch.equal(used.routed_experts[:, 7:], replayed.live_routed_experts[:, 7:])
    assert replayed.live_routed_experts.shape == (4, 10, 2, 2)
    assert replayed.replayed[:, :7].all() and not replayed.replayed[:, 7:].any()


def test_a_forward_longer_than_the_record_is_live_past_its_end(model, tokens) -> None:
    routes = foreign(model, (4, 5))
    with torch.no_grad(), replay_routing(model, routes) as replayed, record_routing(model) as used:
        model(tokens)
    assert torch.equal(used.routed_experts[:, :5], routes)
    assert torch.equal(used.routed_experts[:, 5:], replayed.live_routed_experts[:, 5:])
    assert replayed.replayed[:, :5].all() and not replayed.replayed[:, 5:].any()


def test_a_dense_control_replays_in_any_order(build, tokens) -> None:
    model = build(num_experts=2)
    routes = record(model, tokens)
    with torch.no_grad():
        plain = model(tokens).logits
        with replay_routing(model, routes.flip(-1)):
            assert torch.allclose(model(tokens).logits, plain, atol=1e-6)


def test_two_models_replay_side_by_side(build, tokens) -> None:
    one, two = build(), build("olmoe")
    routes = foreign(one, tokens.shape)
    with torch.no_grad(), replay_routing(one, routes), record_routing(two) as other:
        one(tokens)
        two(tokens)
    assert torch.equal(other.routed_experts, record(two, tokens))


def test_an_exception_leaves_the_model_live(model, tokens) -> None:
    own = record(model, tokens)
    with pytest.raises(KeyError), replay_routing(model, foreign(model, tokens.shape)):
        model(tokens)
        raise KeyError
    assert clean(model)
    assert torch.equal(record(model, tokens), own)


def test_a_second_replay_of_one_model_is_refused(model, tokens) -> None:
    routes = foreign(model, tokens.shape)
    with (
        replay_routing(model, routes),
        pytest.raises(ValueError, match="another replay context is open"),
        replay_routing(model, routes),
    ):
        pass


def test_forwards_that_do_not_add_up_to_the_record_are_refused(model, tokens) -> None:
    routes = foreign(model, (4, 7))
    with torch.no_grad(), replay_routing(model, routes), record_routing(model) as used:
        model(tokens[:3])
        with pytest.raises(ValueError, match="2 sequences starts at row 3 of a record of 4"):
            model(tokens[:2])
        model(tokens[3:])
    assert torch.equal(used.routed_experts, routes)  # the refused forward took no rows


def test_two_caches_in_turn_are_refused(model, tokens) -> None:
    """A cache that came before would be given the rows of the one that came after."""
    routes = foreign(model, tokens.shape)
    with torch.no_grad(), replay_routing(model, routes):
        first = model(tokens[:2, :4], use_cache=True).past_key_values
        second = model(tokens[2:, :4], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="does not continue the last forward"):
            model(tokens[:2, 4:], past_key_values=first)
        model(tokens[2:, 4:], past_key_values=second)


def test_copies_of_a_cache_in_turn_are_refused(model, tokens) -> None:
    """A prefix that several continuations share, as engines have it."""
    with torch.no_grad(), record_routing(model):
        prefix = model(tokens[:1, :4], use_cache=True).past_key_values
        first, second = copy.deepcopy(prefix), copy.deepcopy(prefix)
        model(tokens[:1, 4:5], past_key_values=first)
        with pytest.raises(ValueError, match="does not continue the last forward"):
            model(tokens[1:2, 4:5], past_key_values=second)


def test_packed_sequences_need_a_packed_record(model, tokens) -> None:
    routes = foreign(model, tokens.shape)
    packed, positions = tokens.reshape(1, -1), torch.arange(7).repeat(1, 4)
    with (
        torch.no_grad(),
        replay_routing(model, routes),
        pytest.raises(ValueError, match="of packed sequences a packed record"),
    ):
        model(packed, position_ids=positions, use_cache=False)
    whole = routes.reshape(1, -1, *routes.shape[2:])
    with torch.no_grad(), replay_routing(model, whole), record_routing(model) as used:
        model(packed, position_ids=positions, use_cache=False)
    assert torch.equal(used.routed_experts, whole)
    # Sequences longer than what is recorded of them are another thing, in parts as well.
    with torch.no_grad(), replay_routing(model, routes[:, :-1]), record_routing(model) as used:
        for rows in (slice(0, 2), slice(2, 4)):
            model(tokens[rows], use_cache=False)
    assert torch.equal(used.routed_experts[:, :-1], routes[:, :-1])


@pytest.mark.parametrize("context", ["record", "replay"])
def test_a_router_outside_of_a_forward_is_refused(model, tokens, context) -> None:
    """`model.forward(...)` passes by the hooks: replay would be off without a word."""
    routes = foreign(model, tokens.shape)
    opened = record_routing(model) if context == "record" else replay_routing(model, routes)
    with (
        torch.no_grad(),
        opened,
        pytest.raises(ValueError, match=r"called outside of a forward of Qwen3MoeModel"),
    ):
        model.model.forward(tokens)


def test_a_record_may_be_changed_once_the_context_is_open(model, tokens) -> None:
    routes = foreign(model, tokens.shape)
    laid_out = routes.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    with torch.no_grad(), replay_routing(model, laid_out), record_routing(model) as used:
        laid_out.zero_()
        model(tokens)
    assert torch.equal(used.routed_experts, routes)
