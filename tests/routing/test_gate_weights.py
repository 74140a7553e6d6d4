"""Gate weights: the laws of recording and replaying them beside the ids (TRR)."""

import pytest
import torch
from routes import foreign, record
from torch import Tensor, nn
from torch.nn import functional as F

from moe_rl.replay_check.experts_watch import watch_experts
from moe_rl.replay_check.families import build_family, family_names
from moe_rl.routing import RouterTap, find_routers, record_routing, replay_routing, router_noise
from moe_rl.routing.gate_weights import find_gate_weights

# Its routers weight the shared experts too.
WEIGHABLE = [name for name in family_names() if name != "inkling_text"]


def output(model, tokens: Tensor) -> Tensor:
    out = model(input_ids=tokens, use_cache=False)
    return out.logits if "logits" in out else out.last_hidden_state


def record_both(model, tokens) -> tuple[Tensor, Tensor]:
    with torch.no_grad(), record_routing(model, gate_weights=True) as recorded:
        output(model, tokens)
    return recorded.routed_experts, recorded.gate_weights


def router_parameters(model) -> list[nn.Parameter]:
    named = [pair for tap in find_routers(model) for pair in tap.module.named_parameters()]
    return [p for name, p in named if not name.startswith("experts.")]


def by_expert(weights: Tensor, ids: Tensor, num_experts: int) -> Tensor:
    """Weights `[N, K]` of experts `[N, K]` as `[N, E]`, 0 at the others."""
    return weights.new_zeros(len(ids), num_experts).scatter_add(-1, ids.long(), weights)


def disturb_routers(model) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in router_parameters(model):
            p.add_(torch.randn(p.shape, generator=generator))


@pytest.mark.parametrize("family", WEIGHABLE)
def test_own_ids_and_weights_replay_to_the_bit_whatever_becomes_of_the_routers(
    family, tokens
) -> None:
    model = build_family(family)
    taps = find_routers(model)
    with torch.no_grad():
        plain = output(model, tokens)
        with (
            record_routing(model, gate_weights=True) as recorded,
            watch_experts(model, taps) as got,
        ):
            watched = output(model, tokens)
    ids, weights = recorded.routed_experts, recorded.gate_weights
    assert torch.equal(watched, plain), "recording changes the output"
    assert weights.shape == ids.shape and weights.dtype == torch.float32
    assert got, "no layer's experts were seen"
    for layer, (used, counted) in got.items():
        ours = by_expert(weights[:, :, layer].flatten(0, 1), ids[:, :, layer].flatten(0, 1), 16)
        # Zaya's choice of no expert reaches the experts as expert 0 of weight 0.
        assert torch.equal(ours, by_expert(counted, used, 16))

    # Replaying both changes no bit, the routers get exactly nothing, and they are told nothing.
    with replay_routing(model, ids, gate_weights=weights):
        again = output(model, tokens)
        again.square().sum().backward()
    assert torch.equal(again, plain)
    assert all(p.grad is None or not p.grad.any() for p in router_parameters(model))
    others = [p.grad for name, p in model.named_parameters() if ".experts" in name]
    assert any(grad is not None and grad.any() for grad in others)

    # Whatever becomes of the routers, equal inputs give what they gave.
    disturb_routers(model)
    with torch.no_grad():
        with replay_routing(model, ids, gate_weights=weights):
            assert torch.equal(output(model, tokens), plain)
        with replay_routing(model, ids):
            assert not torch.equal(output(model, tokens), plain)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3", "llama4_text", "jetmoe"])
def test_tokens_without_a_record_teach_the_router_and_no_others_do(build, tokens, family) -> None:
    model = build(family)
    ids, weights = record_both(model, tokens)
    ids[1], weights[1] = -1, torch.nan
    pull = torch.randn(4, 7, 32, generator=torch.Generator().manual_seed(2))

    def gradients(rows: slice) -> list[Tensor]:
        model.zero_grad()
        with replay_routing(model, ids, gate_weights=weights):
            (output(model, tokens) * pull)[rows].sum().backward()
        return [p.grad.clone() for p in router_parameters(model)]

    for all_rows, live in zip(gradients(slice(None)), gradients(slice(1, 2)), strict=True):
        assert live.any()
        assert torch.allclose(all_rows, live, rtol=1e-4, atol=1e-6)
    assert not any(grad.any() for grad in gradients(slice(2, 4)))


def told_layer(mlp, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """A Qwen3-MoE block that is told experts and weights, written out token by token."""
    out = []
    for h, chosen, counted in zip(hidden, ids.tolist(), weights, strict=True):
        parts = []
        for e in chosen:
            gate, up = (mlp.experts.gate_up_proj[e] @ h).chunk(2)
            parts.append(mlp.experts.down_proj[e] @ (F.silu(gate) * up))
        out.append(sum(w * part for w, part in zip(counted, parts, strict=True)))
    return torch.stack(out)


def test_replay_equals_an_independent_model_that_is_told_experts_and_weights(model, tokens) -> None:
    ids = foreign(model, tokens.shape)
    weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(4))
    with replay_routing(model, ids, gate_weights=weights):
        loss = model(tokens, labels=tokens).loss
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for layer, block in enumerate(model.model.layers):

        def told(hidden: Tensor, mlp=block.mlp, layer=layer) -> Tensor:
            tables = (x[:, :, layer].flatten(0, 1) for x in (ids, weights))
            return told_layer(mlp, hidden.flatten(0, 1), *tables).view_as(hidden)

        block.mlp.forward = told
    by_hand = model(tokens, labels=tokens).loss
    by_hand.backward()
    assert torch.allclose(loss, by_hand, rtol=1e-5)
    for name, p in model.named_parameters():
        if p.grad is None:  # routers, which are not asked
            assert not expected[name].any(), name
        else:
            assert torch.allclose(p.grad, expected[name], rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_gradient_checkpointing_recomputes_with_the_weights(
    build, tokens, family, reentrant
) -> None:
    model = build(family).train()
    ids = foreign(model, tokens.shape)
    weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(4))
    ids[0, 3:] = -1

    def gradient() -> Tensor:
        model.zero_grad()
        with replay_routing(model, ids, gate_weights=weights):
            loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()  # outside of the block, where nothing but the graph knows the weights
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    expected = gradient()
    prefix = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{prefix}_checkpointing_enable")({"use_reentrant": reentrant})
    assert torch.equal(gradient(), expected)


def test_steps_of_a_cache_and_what_runs_on_take_their_places(model, tokens) -> None:
    ids, weights = record_both(model, tokens)
    disturb_routers(model)
    with torch.no_grad():
        with replay_routing(model, ids, gate_weights=weights):
            whole = model(tokens).logits
        with (
            replay_routing(model, ids[:, :5], gate_weights=weights[:, :5]),
            record_routing(model, gate_weights=True) as used,
        ):
            first = model(tokens[:, :4], use_cache=True)
            cache = first.past_key_values
            steps = [model(tokens[:, i : i + 1], past_key_values=cache).logits for i in range(4, 7)]
        assert torch.allclose(torch.cat([first.logits, steps[0]], 1), whole[:, :5], atol=1e-5)
        assert torch.equal(used.gate_weights[:, :5], weights[:, :5])
        live = used.gate_weights[:, 5:].sum(-1)  # norm_topk_prob
        assert torch.allclose(live, torch.ones_like(live))
        with replay_routing(model, ids, gate_weights=weights):
            parts = [model(rows).logits for rows in tokens.split([1, 3])]
        assert torch.allclose(torch.cat(parts), whole, atol=1e-5)


def test_noisy_choices_are_recorded_with_their_clean_weights(model, tokens) -> None:
    generator = torch.Generator().manual_seed(6)

    def draw(layer: int, logits: Tensor) -> Tensor:
        return torch.randn(logits.shape, generator=generator)

    with (
        torch.no_grad(),
        router_noise(model, draw),
        record_routing(model, gate_weights=True, router_logits=True) as recorded,
    ):
        noisy = output(model, tokens)
    ids, weights = recorded.routed_experts, recorded.gate_weights
    assert not torch.equal(ids, record(model, tokens))
    clean = recorded.router_logits.softmax(-1).gather(-1, ids.long())
    assert torch.allclose(weights, clean / clean.sum(-1, keepdim=True))
    with torch.no_grad(), replay_routing(model, ids, gate_weights=weights):
        assert torch.equal(output(model, tokens), noisy)


def test_in_bfloat16_both_replay_to_the_bit(model, tokens) -> None:
    model.to(torch.bfloat16)
    plain = output(model, tokens)
    ids, weights = record_both(model, tokens)
    with replay_routing(model, ids, gate_weights=weights):
        assert torch.equal(output(model, tokens), plain)


def test_logits_are_not_taken_for_weights_where_every_expert_is_on() -> None:
    tap = RouterTap(name="router", module=nn.Identity(), num_experts=2, top_k=2)
    logits, weights, ids = torch.randn(3, 2), torch.rand(3, 2), torch.tensor([[0, 1]] * 3)
    for given in ((logits, weights, ids), (logits, ids, weights), (ids, weights), (weights, ids)):
        found, put = find_gate_weights(tap, given, ids, logits)
        assert torch.equal(found, weights)
        changed = put(torch.zeros(3, 2))
        for before, after in zip(given, changed, strict=True):
            assert torch.equal(after, before) != (before is weights)


def test_what_does_not_fit_is_refused_in_one_line(model, tokens) -> None:
    ids, weights = record_both(model, tokens)
    broken = weights.clone()
    broken[1, 2, 0, 1] = torch.nan
    for given, message in (
        (weights[:, :3], r"gate_weights: shape is \[4, 3, 2, 2\] of torch.float32; pass one float"),
        (weights.long(), r"of torch.int64; pass one float weight"),
        (broken, r"gate_weights: \[1, 2, 0\] holds .*nan\], but its ids are recorded; pass finite"),
    ):
        with (
            pytest.raises(ValueError, match=message),
            replay_routing(model, ids, gate_weights=given),
        ):
            pass
    with record_routing(model) as recorded:
        output(model, tokens)
    with pytest.raises(ValueError, match="gate_weights=True to read gate weights"):
        _ = recorded.gate_weights
    router = find_routers(model)[0].module
    own = router.forward
    router.forward = lambda hidden: own(hidden)[::2]  # logits and ids
    with pytest.raises(
        ValueError, match=r"'model.layers.0.mlp.gate' .*returns no weights \[..., 2\]"
    ):
        record_both(model, tokens)


@pytest.mark.skipif("inkling_text" not in family_names(), reason="transformers lacks the family")
def test_a_router_that_weights_more_than_its_choice_is_refused() -> None:
    model = build_family("inkling_text")
    with (
        pytest.raises(ValueError, match="weights its shared experts too"),
        record_routing(model, gate_weights=True),
    ):
        pass
