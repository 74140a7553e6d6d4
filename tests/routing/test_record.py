"""Recording: what is recorded, in which place, and that recording changes nothing."""

import pytest
import torch
from routes import clean, record
from torch.nn import functional as F

from moe_rl.routing import find_routers, record_routing, replay_routing, router_noise

KINDS = ["qwen3_moe", "olmoe", "mixtral", "gpt_oss", "deepseek_v3", "deepseek_v2", "jetmoe"]
SOFTMAX = ["qwen3_moe", "olmoe", "mixtral"]


@pytest.mark.parametrize("family", KINDS)
def test_recording_changes_nothing(build, tokens, family) -> None:
    model = build(family)
    with torch.no_grad():
        plain = model(tokens).logits
        with record_routing(model, router_logits=True) as recorded:
            watched = model(tokens).logits
    assert torch.equal(plain, watched)
    layers = len(find_routers(model))
    assert recorded.routed_experts.dtype == torch.int16
    assert recorded.routed_experts.shape == (4, 7, layers, 2)
    assert recorded.router_logits.dtype == torch.float32
    assert recorded.router_logits.shape == (4, 7, layers, 8)


@pytest.mark.parametrize("family", SOFTMAX)
def test_the_record_is_the_topk_of_the_recorded_logits(build, tokens, family) -> None:
    model = build(family)
    with record_routing(model, router_logits=True) as recorded:
        out = model(tokens, output_router_logits=True)
    logits = recorded.router_logits
    assert not logits.requires_grad
    reported = torch.stack([x.view(4, 7, -1) for x in out.router_logits], dim=2)
    assert torch.equal(logits, reported.detach().float())
    assert torch.equal(recorded.routed_experts.long(), logits.topk(2, dim=-1).indices)


def test_layers_and_positions_are_in_their_places(model, tokens) -> None:
    inputs = []
    taps = find_routers(model)
    handles = [t.module.register_forward_pre_hook(lambda m, a: inputs.append(a[0])) for t in taps]
    recorded = record(model, tokens)
    for handle in handles:
        handle.remove()
    for layer, (tap, hidden) in enumerate(zip(taps, inputs, strict=True)):
        own = F.linear(hidden, tap.module.weight).softmax(-1).topk(2, dim=-1).indices
        assert torch.equal(recorded[:, :, layer].long(), own.view(4, 7, 2))


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_prefill_and_decode_record_what_a_full_forward_records(build, tokens, family) -> None:
    model = build(family)
    with torch.no_grad(), record_routing(model, router_logits=True) as recorded:
        cache = model(tokens[:, :4], use_cache=True).past_key_values
        for position in range(4, 7):
            model(tokens[:, position : position + 1], past_key_values=cache)
    assert torch.equal(recorded.routed_experts, record(model, tokens))
    assert recorded.router_logits.shape == (4, 7, 2, 8)


def test_generate_records_every_token_that_was_fed(model, tokens) -> None:
    with record_routing(model) as recorded:
        out = model.generate(tokens, max_new_tokens=5, do_sample=False)
    assert out.shape == (4, 12)
    assert torch.equal(recorded.routed_experts, record(model, out[:, :-1]))


def test_two_generations_record_two_blocks_of_rows(model, tokens) -> None:
    with record_routing(model) as recorded:
        long = model.generate(tokens[:3], max_new_tokens=4, do_sample=False)
        short = model.generate(tokens[3:, :5], max_new_tokens=2, do_sample=False)
    got = recorded.routed_experts
    assert got.shape == (4, 10, 2, 2)
    assert torch.equal(got[:3], record(model, long[:, :-1]))
    assert torch.equal(got[3:, :6], record(model, short[:, :-1]))
    assert (got[3:, 6:] == -1).all()


def test_a_pass_in_chunks_of_rows_records_what_one_pass_records(model, tokens) -> None:
    with torch.no_grad(), record_routing(model, router_logits=True) as recorded:
        for chunk in (tokens[:1], tokens[1:3], tokens[3:, :5]):
            model(chunk, use_cache=False)
    whole = record(model, tokens)
    assert torch.equal(recorded.routed_experts[:3], whole[:3])
    assert torch.equal(recorded.routed_experts[3, :5], whole[3, :5])
    assert (recorded.routed_experts[3, 5:] == -1).all()
    assert recorded.router_logits[3, 5:].isnan().all()
    assert recorded.router_logits[:3].isfinite().all()


def test_a_context_on_a_filled_cache_records_from_there(model, tokens) -> None:
    with torch.no_grad():
        cache = model(tokens[:, :3], use_cache=True).past_key_values
        with record_routing(model) as recorded:
            model(tokens[:, 3:5], past_key_values=cache)
            model(tokens[:, 5:], past_key_values=cache)
    assert torch.equal(recorded.routed_experts, record(model, tokens)[:, 3:])


def test_a_cache_that_is_cut_back_is_recorded_anew(model, tokens) -> None:
    with torch.no_grad(), record_routing(model) as recorded:
        cache = model(tokens[:, :4], use_cache=True).past_key_values
        model(tokens[:, :3].flip(0), past_key_values=cache)  # guesses, none of which survives
        cache.crop(-3)
        model(tokens[:, 4:6], past_key_values=cache)
    assert torch.equal(recorded.routed_experts, record(model, tokens[:, :6]))


def test_the_base_model_and_embeddings_are_as_good_as_the_model(model, tokens) -> None:
    whole = record(model, tokens)
    assert torch.equal(record(model.model, tokens), whole)
    with torch.no_grad(), record_routing(model) as recorded:
        model.model(inputs_embeds=model.get_input_embeddings()(tokens))
    assert torch.equal(recorded.routed_experts, whole)
    with torch.no_grad(), record_routing(model) as recorded:
        model.model(tokens)
    assert torch.equal(recorded.routed_experts, whole)


def test_records_nest(model, tokens) -> None:
    with torch.no_grad(), record_routing(model) as outer:
        model(tokens[:1])
        with record_routing(model) as inner:
            model(tokens[1:])
    assert outer.routed_experts.shape[0] == 4
    assert torch.equal(outer.routed_experts[1:], inner.routed_experts)


def test_the_model_is_clean_afterwards(model, tokens) -> None:
    with record_routing(model):
        assert not clean(model)
        model(tokens)
    assert clean(model)


def test_an_exception_leaves_the_model_clean_and_the_record_usable(model, tokens) -> None:
    with pytest.raises(KeyError), record_routing(model) as recorded:
        model(tokens)
        raise KeyError
    assert clean(model)
    assert recorded.routed_experts.shape == (4, 7, 2, 2)


def test_a_forward_that_fails_is_not_recorded(model, tokens) -> None:
    def fail(module, args) -> None:
        raise RuntimeError("out of memory")

    with torch.no_grad(), record_routing(model) as recorded:
        model(tokens[:2])
        handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            model(tokens[2:])
        handle.remove()
        model(tokens[2:])
    assert torch.equal(recorded.routed_experts, record(model, tokens))


def test_a_forward_attribute_that_was_there_before_is_put_back(model, tokens) -> None:
    router = find_routers(model)[0].module
    own = router.forward
    router.forward = own
    whole = record(model, tokens)
    assert router.__dict__["forward"] is own
    del router.forward
    assert torch.equal(record(model, tokens), whole)


def test_a_cache_of_another_batch_is_refused(model, tokens) -> None:
    with torch.no_grad():
        cache = model(tokens[:, :3], use_cache=True).past_key_values
        longer = model(tokens, use_cache=True).past_key_values
        with record_routing(model):
            model(tokens[:2, :3])
            with pytest.raises(ValueError, match="does not continue the last forward"):
                model(tokens[:, 3:], past_key_values=cache)
        with record_routing(model):
            model(tokens[:, :3])
            with pytest.raises(ValueError, match="does not continue the last forward"):
                model(tokens[:, :1], past_key_values=longer)
        with record_routing(model):
            model(tokens[:, :1], past_key_values=longer)
            with pytest.raises(ValueError, match="does not continue the last forward"):
                model(tokens[:, :1])


def test_a_router_that_does_not_call_topk_is_refused(model, tokens) -> None:
    router = find_routers(model)[1].module
    own = router.forward
    router.top_k = 2
    router.forward = lambda hidden: (None, torch.ones(28, 2), torch.zeros(28, 2).long())
    with (
        torch.no_grad(),
        record_routing(model),
        pytest.raises(ValueError, match=r"'model.layers.1.mlp.gate'.*did not call topk\(k=2\)"),
    ):
        model(tokens)
    router.forward = own


def test_a_router_that_sees_some_tokens_only_is_refused(model, tokens) -> None:
    router = find_routers(model)[0].module
    own = router.forward
    whole = record(model, tokens)
    router.forward = lambda hidden: own(hidden[:20])
    for context in (record_routing(model), replay_routing(model, whole)):
        with (
            torch.no_grad(),
            context,
            pytest.raises(ValueError, match="routed 20 tokens of a forward of 28"),
        ):
            model(tokens)


def test_reading_what_is_not_there_says_why(model, tokens) -> None:
    with torch.no_grad(), record_routing(model) as recorded:
        with pytest.raises(ValueError, match="nothing is recorded"):
            _ = recorded.routed_experts
        model(tokens)
    with pytest.raises(ValueError, match="router_logits=True"):
        _ = recorded.router_logits


@pytest.mark.parametrize("times", [0, 2])
def test_a_router_that_is_not_called_once_in_a_forward_is_refused(model, tokens, times) -> None:
    if times == 0:
        model.model.layers[0].mlp.forward = lambda hidden: hidden
    else:
        model.model.layers[1].mlp = model.model.layers[0].mlp
    found = rf"must call each router once, but called .'model.layers.0.mlp.gate': {times}"
    with torch.no_grad(), record_routing(model), pytest.raises(ValueError, match=found):
        model(tokens)


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "mixtral", "gpt_oss", "jetmoe"])
def test_noise_below_half_the_margin_changes_no_set_and_above_it_some(
    build, tokens, family
) -> None:
    model = build(family)
    with record_routing(model, router_margins=True) as own:
        model(tokens)
    assert own.router_margins.shape == own.routed_experts.shape[:3]
    assert (own.router_margins > 0).all()
    for share, changes in ((0.499, False), (2.0, True)):

        def draw(layer, logits, share=share):
            margins = own.router_margins[:, :, layer].reshape(-1, 1)
            signs = torch.where(torch.arange(logits.shape[-1]) % 2 == 0, 1.0, -1.0)
            return share * margins * signs

        with router_noise(model, draw), record_routing(model) as noisy:
            model(tokens)
        # The first layer alone: behind a changed set the margins are others.
        sets = [r.routed_experts[:, :, 0].sort(-1).values for r in (own, noisy)]
        assert torch.equal(*sets) != changes


def test_margins_of_a_correction_bias_are_those_of_the_scores_that_decide(build, tokens) -> None:
    model = build("deepseek_v3", n_group=1, topk_group=1)
    taps = find_routers(model)
    for tap in taps:
        tap.correction_bias.normal_()
    with record_routing(model, router_logits=True, router_margins=True) as recorded:
        model(tokens)
    for layer, tap in enumerate(taps):
        scores = recorded.router_logits[:, :, layer].sigmoid() + tap.correction_bias
        best = scores.topk(tap.top_k + 1, dim=-1).values
        gaps = best[..., -2] - best[..., -1]
        torch.testing.assert_close(recorded.router_margins[:, :, layer], gaps)
