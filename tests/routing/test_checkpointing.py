"""Gradient checkpointing: what is recomputed takes the routes of the forward it belongs to."""

import copy
import gc

import pytest
import torch
from routes import clean, foreign
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_rl.routing import find_routers, record_routing, replay_routing, router_noise

BOTH_KINDS = pytest.mark.parametrize("reentrant", [True, False])


def train_with_checkpointing(model, reentrant: bool | None):
    model.train()
    # transformers renamed the methods; the old names warn where the new ones exist.
    prefix = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if reentrant is None:
        getattr(model, f"{prefix}_checkpointing_disable")()
    else:
        getattr(model, f"{prefix}_checkpointing_enable")({"use_reentrant": reentrant})
    model.zero_grad()
    return model


def loss_of(model, tokens) -> Tensor:
    return model(tokens, labels=tokens, use_cache=False).loss


def gradient(model) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.fixture(params=["qwen3_moe", "deepseek_v3"])
def family_model(request, build):
    return build(request.param)


@BOTH_KINDS
@pytest.mark.parametrize("backward", ["inside", "outside"])
def test_gradients_equal_those_without_checkpointing(
    family_model, tokens, reentrant, backward
) -> None:
    model, routes = family_model, foreign(family_model, tokens.shape)
    routes[0, 3:] = -1
    train_with_checkpointing(model, None)
    with replay_routing(model, routes):
        loss_of(model, tokens).backward()
    expected = gradient(model)

    train_with_checkpointing(model, reentrant)
    with replay_routing(model, routes), record_routing(model) as used:
        loss = loss_of(model, tokens)
        if backward == "inside":
            loss.backward()
    if backward == "outside":
        loss.backward()
    assert torch.equal(gradient(model), expected)
    assert used.routed_experts.shape == routes.shape  # recomputation is not recorded
    del loss
    gc.collect()
    assert clean(model)


@BOTH_KINDS
def test_recording_under_checkpointing_records_each_forward_once(model, tokens, reentrant) -> None:
    train_with_checkpointing(model, None)
    with record_routing(model, router_logits=True) as plain:
        loss_of(model, tokens).backward()
    expected = gradient(model)
    train_with_checkpointing(model, reentrant)
    with record_routing(model, router_logits=True) as recorded:
        loss_of(model, tokens).backward()
    assert torch.equal(gradient(model), expected)
    assert torch.equal(recorded.routed_experts, plain.routed_experts)
    assert torch.equal(recorded.router_logits, plain.router_logits)
    assert clean(model)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # the one in no_grad
@BOTH_KINDS
def test_live_forwards_after_the_block_are_live_while_a_backward_is_pending(
    model, tokens, reentrant
) -> None:
    routes = foreign(model, tokens.shape)
    train_with_checkpointing(model, None)
    loss_of(model, tokens).backward()
    with replay_routing(model, routes):
        loss_of(model, tokens).backward()
    expected = gradient(model)
    with torch.no_grad():
        plain = model(tokens, use_cache=False).logits

    train_with_checkpointing(model, reentrant)
    with replay_routing(model, routes):
        replayed = loss_of(model, tokens)
    with torch.no_grad():
        assert torch.equal(model(tokens, use_cache=False).logits, plain)
    live = loss_of(model, tokens)
    (replayed + live).backward()
    assert torch.allclose(gradient(model), expected, rtol=1e-4, atol=1e-6)


@BOTH_KINDS
@pytest.mark.parametrize("order", ["together", "first first", "last first"])
def test_each_pending_forward_is_recomputed_with_its_own_routes(
    model, tokens, reentrant, order
) -> None:
    records = [foreign(model, tokens.shape, seed) for seed in (3, 4)]
    train_with_checkpointing(model, None)
    for routes in records:
        with replay_routing(model, routes):
            loss_of(model, tokens).backward()
    expected = gradient(model)

    train_with_checkpointing(model, reentrant)
    losses = []
    for routes in records:
        with replay_routing(model, routes):
            losses.append(loss_of(model, tokens))
    if order == "together":
        sum(losses).backward()
    else:
        for loss in losses if order == "first first" else losses[::-1]:
            loss.backward()
    assert torch.allclose(gradient(model), expected, rtol=1e-4, atol=1e-6)


@BOTH_KINDS
def test_a_live_forward_between_two_replayed_ones_stays_live(model, tokens, reentrant) -> None:
    routes = foreign(model, tokens.shape)

    def run(kind: bool | None) -> Tensor:
        train_with_checkpointing(model, kind)
        with replay_routing(model, routes):
            first = loss_of(model, tokens)
        live = loss_of(model, tokens)
        with replay_routing(model, routes):
            last = loss_of(model, tokens)
        (first + 2 * live + last).backward()
        return gradient(model)

    assert torch.allclose(run(reentrant), run(None), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("checkpointed", [{0, 2}, {1}])
def test_only_some_layers_may_be_checkpointed(build, tokens, checkpointed) -> None:
    model = build(num_hidden_layers=3)
    routes = foreign(model, tokens.shape)

    def run(layers: set[int]) -> Tensor:
        train_with_checkpointing(model, False)
        for index, layer in enumerate(model.model.layers):
            layer.gradient_checkpointing = index in layers
        with replay_routing(model, routes):
            loss = loss_of(model, tokens)
        loss.backward()
        return gradient(model)

    assert torch.equal(run(checkpointed), run(set()))


@BOTH_KINDS
def test_chunks_of_rows_accumulate_the_gradient_of_one_pass(model, tokens, reentrant) -> None:
    routes = foreign(model, tokens.shape)
    train_with_checkpointing(model, None)
    with replay_routing(model, routes):
        (loss_of(model, tokens[:2]) + loss_of(model, tokens[2:])).backward()
    expected = gradient(model)
    train_with_checkpointing(model, reentrant)
    with replay_routing(model, routes):
        for chunk in tokens.split(2):
            loss_of(model, chunk).backward()
    assert torch.allclose(gradient(model), expected, rtol=1e-4, atol=1e-6)


@BOTH_KINDS
def test_noise_is_not_drawn_again(model, tokens, reentrant) -> None:
    def run(kind: bool | None) -> tuple[Tensor, int]:
        draws = []

        def draw(layer: int, logits: Tensor) -> Tensor:
            generator = torch.Generator().manual_seed(len(draws))
            draws.append(layer)
            return torch.randn(logits.shape, generator=generator)

        train_with_checkpointing(model, kind)
        with router_noise(model, draw):
            loss = loss_of(model, tokens)
        loss.backward()
        return gradient(model), len(draws)

    expected, draws = run(None)
    got, draws_again = run(reentrant)
    assert draws == draws_again == 2
    assert torch.equal(got, expected)


def test_a_graph_that_is_kept_can_be_run_twice(model, tokens) -> None:
    routes = foreign(model, tokens.shape)
    train_with_checkpointing(model, False)
    with replay_routing(model, routes):
        loss = loss_of(model, tokens)
    loss.backward(retain_graph=True)
    once = gradient(model)
    loss.backward()
    assert torch.allclose(gradient(model), 2 * once)


def test_the_load_balancing_loss_alone_is_recomputed_with_the_routes(model, tokens) -> None:
    routes = foreign(model, tokens.shape)

    def auxiliary(kind: bool | None) -> Tensor:
        train_with_checkpointing(model, kind)
        with replay_routing(model, routes):
            out = model(tokens, output_router_logits=True, use_cache=False)
        torch.stack(out.router_logits).logsumexp(-1).square().sum().backward()
        return gradient(model)

    assert torch.allclose(auxiliary(False), auxiliary(None), rtol=1e-4, atol=1e-6)


def test_checkpointing_from_elsewhere_is_noticed(model, tokens) -> None:
    routes = foreign(model, tokens.shape)
    train_with_checkpointing(model, None)
    with replay_routing(model, routes):
        loss_of(model, tokens).backward()
    expected = gradient(model)
    for layer in model.model.layers:

        def checkpointed(*args, own=layer.forward, **kwargs):
            return checkpoint(own, *args, use_reentrant=False, **kwargs)

        layer.forward = checkpointed
    model.zero_grad()
    with replay_routing(model, routes):
        loss = loss_of(model, tokens)
    loss.backward()
    assert torch.equal(gradient(model), expected)


def test_a_forward_from_before_the_context_in_the_same_backward_is_refused(model, tokens) -> None:
    train_with_checkpointing(model, False)
    before = loss_of(model, tokens)
    with replay_routing(model, foreign(model, tokens.shape)):
        inside = loss_of(model, tokens)
    with pytest.raises(ValueError, match="recomputed twice in one backward pass"):
        (before + inside).backward()


def test_a_forward_from_before_the_context_is_recomputed_live(model, tokens) -> None:
    train_with_checkpointing(model, None)
    loss_of(model, tokens).backward()
    expected = gradient(model)
    train_with_checkpointing(model, False)
    before = loss_of(model, tokens)
    with replay_routing(model, foreign(model, tokens.shape)):
        inside = loss_of(model, tokens)
        inside.backward()
        model.zero_grad()
        before.backward()
    assert torch.equal(gradient(model), expected)


def test_a_discarded_loss_takes_the_taps_off(model, tokens) -> None:
    train_with_checkpointing(model, False)
    with pytest.raises(KeyError), replay_routing(model, foreign(model, tokens.shape)):
        loss = loss_of(model, tokens)
        raise KeyError
    assert not clean(model)  # backward may still come
    del loss
    gc.collect()
    assert clean(model)


def test_without_checkpointing_the_taps_do_not_wait_for_backward(model, tokens) -> None:
    train_with_checkpointing(model, None)
    with replay_routing(model, foreign(model, tokens.shape)):
        loss = loss_of(model, tokens)
    assert clean(model)
    loss.backward()


@pytest.mark.gpu
@BOTH_KINDS
def test_recomputation_in_engine_threads_takes_the_routes(model, tokens, reentrant) -> None:
    model, tokens = model.cuda(), tokens.cuda()
    routes = foreign(model, tokens.shape)
    train_with_checkpointing(model, None)
    with replay_routing(model, routes):
        loss_of(model, tokens).backward()
    expected = gradient(model)
    train_with_checkpointing(model, reentrant)
    with replay_routing(model, routes):
        loss = loss_of(model, tokens)
    loss.backward()
    assert torch.allclose(gradient(model), expected, rtol=1e-3, atol=1e-5)


@BOTH_KINDS
def test_a_copy_made_while_a_graph_is_alive_has_its_own_routers(
    family_model, tokens, reentrant
) -> None:
    """A frozen reference policy, copied while the loss of a checkpointed step is in scope."""
    model = train_with_checkpointing(family_model, reentrant)
    with replay_routing(model, foreign(model, tokens.shape)):
        loss = loss_of(model, tokens)
        loss.backward()
    assert not clean(model)
    reference = copy.deepcopy(model).eval()
    with torch.no_grad():
        expected = model.eval()(tokens).logits
        for tap in find_routers(model):
            for parameter in tap.module.parameters():
                parameter.normal_()
        assert not torch.equal(model(tokens).logits, expected)
        assert torch.equal(reference(tokens).logits, expected)
        with record_routing(reference) as recorded:
            reference(tokens)
        with replay_routing(reference, recorded.routed_experts):
            assert torch.equal(reference(tokens).logits, expected)
    del loss


def test_a_copy_made_inside_a_context_is_a_model_like_any(model, tokens) -> None:
    with torch.no_grad(), record_routing(model) as recorded:
        expected = model(tokens).logits
        other = copy.deepcopy(model)
        assert torch.equal(other(tokens[:1]).logits, model(tokens[:1]).logits)
    assert recorded.routed_experts.shape[0] == len(tokens) + 1  # the copy's forward is not in it
    with torch.no_grad(), record_routing(other) as again:
        assert torch.equal(other(tokens).logits, expected)
    assert torch.equal(again.routed_experts, recorded.routed_experts[: len(tokens)])


@BOTH_KINDS
def test_checkpointing_around_the_whole_model_is_refused(model, tokens, reentrant) -> None:
    """Its recomputation would take the rows that come next, or the live choice."""
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
    with replay_routing(model, foreign(model, tokens.shape)):
        logits = checkpoint(
            lambda x: model(inputs_embeds=x, use_cache=False).logits,
            embedded,
            use_reentrant=reentrant,
        )
        with pytest.raises(ValueError, match="the whole model is called inside a backward pass"):
            logits.sum().backward()
