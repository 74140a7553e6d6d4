"""The forward pass: three layouts of the same tokens give the same numbers."""

import pytest
import torch
from small_policy import ALPHABET, PROMPTS, rollout

from moe_rl.batch import response_positions
from moe_rl.policy.build import build_policy
from moe_rl.policy.forward import ForwardOptions, Layout, choose_layout, response_pass
from moe_rl.policy.pass_noise import PassNoise
from moe_rl.policy.policy import Policy
from moe_rl.presets import preset

LAYOUTS: list[Layout] = ["one_pass", "cached"]
PADDING = pytest.mark.parametrize("prompts", [PROMPTS[:2], PROMPTS], ids=["equal", "padded"])


@PADDING
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_change_neither_values_nor_gradients(
    policy: Policy, prompts: list[str], layout: Layout
) -> None:
    batch = rollout(policy, prompts)
    options = ForwardOptions(router_logits=True, entropy=True)
    gradients = []
    outputs = []
    for name in (layout, "whole"):
        policy.model.zero_grad()
        output = response_pass(policy, batch, options, name)
        output.logprobs[batch.response_mask].sum().backward()
        gradients.append({n: p.grad.clone() for n, p in policy.model.named_parameters()})
        outputs.append(output)
    shared, full = outputs
    mask = batch.response_mask
    torch.testing.assert_close(shared.logprobs[mask], full.logprobs[mask], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(shared.entropy[mask], full.entropy[mask], atol=2e-5, rtol=1e-5)
    length = batch.prompt_ids.shape[1]
    routes = [response_positions(o.routed_experts, length)[mask].sort(-1).values for o in outputs]
    assert (routes[0] == routes[1]).float().mean() > 0.999
    torch.testing.assert_close(
        shared.router_logits[mask], full.router_logits[mask], atol=1e-4, rtol=1e-4
    )
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(
            gradient, gradients[1][name], atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


@PADDING
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_replay_the_same_gate_weights(
    policy: Policy, prompts: list[str], layout: Layout
) -> None:
    batch = rollout(policy, prompts)
    weights = torch.rand(batch.routed_experts.shape, generator=torch.Generator().manual_seed(1))
    # What the rows of a prompt replay, they replay in all its responses.
    length = batch.prompt_ids.shape[1]
    weights[:, :length] = weights[:: batch.group_size, :length].repeat_interleave(3, dim=0)
    options = ForwardOptions(replay=batch.routed_experts, replay_weights=weights)
    with torch.no_grad():
        ours, whole = (response_pass(policy, batch, options, name) for name in (layout, "whole"))
        ids = response_pass(policy, batch, ForwardOptions(replay=batch.routed_experts)).logprobs
    mask = batch.response_mask
    torch.testing.assert_close(ours.logprobs[mask], whole.logprobs[mask], atol=2e-5, rtol=1e-5)
    assert (ids - ours.logprobs)[mask].abs().max() > 1e-2, "the weights must matter"


@PADDING
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_replay_the_same_choices_and_see_the_same_live_ones(
    policy: Policy, prompts: list[str], layout: Layout
) -> None:
    batch = rollout(policy, prompts)
    with torch.no_grad():
        record = response_pass(policy, batch, ForwardOptions(), "whole").routed_experts
        foreign = (record + 1) % 8
        foreign[record < 0] = -1
        foreign[:, ::3] = -1  # some tokens choose live
        ours, whole = (
            response_pass(policy, batch, ForwardOptions(replay=foreign), name)
            for name in (layout, "whole")
        )
    mask = batch.response_mask
    torch.testing.assert_close(ours.logprobs[mask], whole.logprobs[mask], atol=2e-5, rtol=1e-5)
    read = response_positions(ours.routed_experts, batch.prompt_ids.shape[1])[mask]
    expected = response_positions(whole.routed_experts, batch.prompt_ids.shape[1])[mask]
    assert (read.sort(-1).values == expected.sort(-1).values).float().mean() > 0.999
    recorded = response_positions((foreign >= 0).all(dim=-1), batch.prompt_ids.shape[1])
    for output in (ours, whole):
        assert torch.equal(output.replayed[mask], recorded[mask]) and not recorded[mask].all()
    alone = response_pass(policy, batch, ForwardOptions())
    live = alone.logprobs
    assert alone.replayed is None
    assert (live - ours.logprobs)[mask].abs().max() > 1e-2, "the foreign choices must matter"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_see_the_same_noise(policy: Policy, layout: Layout) -> None:
    batch = rollout(policy, PROMPTS[:2])
    source = PassNoise(std=2.0, seed=1, step=0, purpose="old", prompts=range(2), group_size=3)
    with torch.no_grad():
        quiet = response_pass(policy, batch, ForwardOptions()).logprobs
        noisy, whole = (
            response_pass(policy, batch, ForwardOptions(noise=source), name).logprobs
            for name in (layout, "whole")
        )
    mask = batch.response_mask
    torch.testing.assert_close(noisy[mask], whole[mask], atol=2e-5, rtol=1e-5)
    assert (quiet - noisy)[mask].abs().max() > 1e-2, "the noise must matter"


def test_responses_of_one_token_need_no_second_read(policy: Policy) -> None:
    batch = rollout(policy, PROMPTS[:2], length=1)
    assert batch.response_ids.shape[1] == 1
    options = ForwardOptions(router_logits=True)
    ours, whole = (response_pass(policy, batch, options, name) for name in (None, "whole"))
    torch.testing.assert_close(ours.logprobs, whole.logprobs, atol=2e-5, rtol=1e-5)
    assert torch.equal(ours.routed_experts, whole.routed_experts)


def test_checkpointing_takes_the_layout_without_a_cache(policy: Policy) -> None:
    assert choose_layout(policy) == "one_pass"
    stock = build_policy(preset("tiny").model, ALPHABET, fuse=False)
    assert choose_layout(stock) == "cached"
    stock.model.gradient_checkpointing_enable()
    assert choose_layout(stock) == "cached", "evaluation mode recomputes nothing"
    stock.model.train()
    assert choose_layout(stock) == "whole"


def test_the_engine_and_the_trainer_agree_on_log_probs_and_routes(policy: Policy) -> None:
    batch = rollout(policy, PROMPTS)
    with torch.no_grad():
        output = response_pass(policy, batch, ForwardOptions())
    mask = batch.response_mask
    torch.testing.assert_close(
        output.logprobs[mask], batch.rollout_logprobs[mask], atol=2e-5, rtol=1e-5
    )
    read = mask[:, 1:]  # the route of a token is known once the next one has been predicted
    length = batch.prompt_ids.shape[1]
    ours = output.routed_experts[:, length:-1][read].sort(-1).values
    theirs = batch.routed_experts[:, length:-1][read].sort(-1).values
    assert (ours == theirs).float().mean() > 0.999


def test_replaying_its_own_record_changes_no_log_prob(policy: Policy) -> None:
    batch = rollout(policy, PROMPTS)
    with torch.no_grad():
        live = response_pass(policy, batch, ForwardOptions())
        replayed = response_pass(policy, batch, ForwardOptions(replay=live.routed_experts))
    assert torch.equal(live.logprobs, replayed.logprobs)
    assert torch.equal(live.routed_experts, replayed.routed_experts)


def test_log_probs_of_a_sequence_do_not_depend_on_its_neighbours(policy: Policy) -> None:
    batch = rollout(policy, PROMPTS)
    with torch.no_grad():
        together = response_pass(policy, batch, ForwardOptions()).logprobs
        for p in range(len(PROMPTS)):
            part = batch.select_prompts(slice(p, p + 1))
            alone = response_pass(policy, part, ForwardOptions()).logprobs
            rows = slice(3 * p, 3 * p + 3)
            mask = part.response_mask
            torch.testing.assert_close(alone[mask], together[rows][mask], atol=2e-5, rtol=1e-5)


def test_gradient_checkpointing_changes_no_gradient(policy: Policy) -> None:
    batch = rollout(policy, PROMPTS)
    with torch.no_grad():
        record = response_pass(policy, batch, ForwardOptions()).routed_experts
    other = (record + 1) % 8
    other[record < 0] = -1
    gradients = []
    for checkpointing in (False, True):
        policy.model.zero_grad()
        if checkpointing:
            policy.model.gradient_checkpointing_enable()
            policy.model.train()
        output = response_pass(policy, batch, ForwardOptions(replay=other), "whole")
        output.logprobs[batch.response_mask].sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.model.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-5)
