"""The instruments put together: every number from the tensors and tokens that its definition names.

The formulas of ratios, branches and routing are tested beside this file and in tests/routing; here
each number is taken again token by token, from passes that all differ.
"""

import math
from dataclasses import dataclass
from statistics import fmean, pstdev, pvariance

import pytest
import torch
from torch import Tensor

from moe_rl.batch import Experience, RolloutBatch
from moe_rl.metrics.branches import branch_shares
from moe_rl.metrics.instruments import (
    mismatch_metrics,
    rollout_metrics,
    update_metrics,
    value_metrics,
)
from moe_rl.metrics.ratios import gate_statistics, mismatch_statistics, ratio_tail, split_log_ratio
from moe_rl.policy.forward import ForwardOutput

PROMPTS, GROUP, PROMPT, LENGTH, LAYERS, EXPERTS, CHOSEN = 2, 2, 3, 5, 3, 6, 2
BATCH = PROMPTS * GROUP
ALL_BY_LOGITS = torch.ones(LAYERS, dtype=torch.bool)


@dataclass
class Scene:
    """One rollout, its old pass and the pass of an update, with garbage in the padding."""

    batch: RolloutBatch
    old: ForwardOutput
    new: ForwardOutput
    experience: Experience
    gradient: Tensor
    draw: torch.Generator

    @property
    def mask(self) -> Tensor:
        return self.batch.response_mask

    @property
    def tokens(self) -> list[tuple[int, int]]:
        """Sequence and place of every response token."""
        return [(int(b), int(t)) for b, t in self.mask.nonzero()]

    def logprobs(self) -> Tensor:
        """Log-probs of another pass."""
        return _logprobs(self.draw, self.mask)


def _logprobs(draw: torch.Generator, mask: Tensor) -> Tensor:
    return (-3 * torch.rand(mask.shape, generator=draw)).masked_fill(~mask, math.nan)


@pytest.fixture
def scene() -> Scene:
    draw = torch.Generator().manual_seed(0)
    mask = torch.arange(LENGTH) < torch.tensor([5, 2, 4, 3])[:, None]

    def routes() -> Tensor:
        scores = torch.rand(BATCH, PROMPT + LENGTH, LAYERS, EXPERTS, generator=draw)
        ids = scores.topk(CHOSEN).indices.to(torch.int16)
        ids[:, -1] = -1
        return ids

    def passed(record: Tensor) -> ForwardOutput:
        return ForwardOutput(
            logprobs=_logprobs(draw, mask),
            entropy=torch.rand(BATCH, LENGTH, generator=draw).masked_fill(~mask, math.nan),
            routed_experts=record,
            router_logits=torch.randn(BATCH, LENGTH, LAYERS, EXPERTS, generator=draw),
        )

    batch = RolloutBatch(
        prompt_ids=torch.ones(PROMPTS, PROMPT, dtype=torch.int64),
        prompt_mask=torch.ones(PROMPTS, PROMPT, dtype=torch.bool),
        response_ids=torch.ones(BATCH, LENGTH, dtype=torch.int64),
        response_mask=mask,
        rollout_logprobs=_logprobs(draw, mask),
        routed_experts=routes(),
        router_logits=None,
        truncated=torch.zeros(BATCH, dtype=torch.bool),
    )
    old, new = passed(routes()), passed(routes())
    assert old.routed_experts is not None
    experience = Experience(
        batch=batch,
        advantages=torch.tensor([1.0, -1.0, 0.5, -0.5]),
        old_logprobs=old.logprobs,
        old_routes=old.routed_experts,
        old_router_logits=old.router_logits,
        replay=batch.routed_experts,
    )
    gradient = torch.randn(BATCH, LENGTH, generator=draw).masked_fill(~mask, 0.0)
    return Scene(batch, old, new, experience, gradient, draw)


def chosen(record: Tensor | None, sequence: int, token: int, layer: int) -> set[int]:
    """The experts at the position where a response token is predicted."""
    assert record is not None
    return set(record[sequence, PROMPT + token - 1, layer].tolist())


def margin(logits: Tensor) -> float:
    """How far one router [E] is from another choice."""
    ordered = sorted(logits.tolist(), reverse=True)
    return ordered[CHOSEN - 1] - ordered[CHOSEN]


def updated(scene: Scene, **changes: object) -> dict[str, object]:
    options: dict[str, object] = {"gradient": scene.gradient, "by_logits": ALL_BY_LOGITS}
    return update_metrics(scene.new, scene.experience, **options | changes)  # type: ignore[arg-type]


def test_churn_compares_the_update_s_routes_with_the_old_policy_s(scene: Scene) -> None:
    found = updated(scene, per_position=True)
    left = {
        (b, t, layer): len(
            chosen(scene.new.routed_experts, b, t, layer)
            - chosen(scene.old.routed_experts, b, t, layer)
        )
        / CHOSEN
        for b, t in scene.tokens
        for layer in range(LAYERS)
    }
    per_layer = [fmean([v for (*_, at), v in left.items() if at == n]) for n in range(LAYERS)]
    per_position = [fmean([v for (_, at, _), v in left.items() if at == n]) for n in range(LENGTH)]
    flipped = [any(left[b, t, layer] for layer in range(LAYERS)) for b, t in scene.tokens]
    assert found["routing/churn_per_layer"] == pytest.approx(per_layer)
    assert found["routing/churn"] == pytest.approx(fmean(per_layer))
    assert found["routing/churn_per_position"] == pytest.approx(per_position)
    assert found["routing/router_disagreement"] == pytest.approx(
        fmean([v > 0 for v in left.values()])
    )
    assert found["routing/token_disagreement"] == pytest.approx(fmean(flipped))


def test_branches_know_the_tokens_whose_routers_flipped(scene: Scene) -> None:
    assert scene.new.routed_experts is not None
    scene.experience.old_routes[2:] = scene.new.routed_experts[2:]
    flipped = (torch.arange(BATCH) < 2)[:, None].expand(BATCH, LENGTH).clone()
    for b, t in scene.tokens:
        flipped[b, t] &= any(
            chosen(scene.new.routed_experts, b, t, layer)
            != chosen(scene.old.routed_experts, b, t, layer)
            for layer in range(LAYERS)
        )
    log_ratio = scene.new.logprobs - scene.old.logprobs
    advantages = scene.experience.advantages[:, None].expand(BATCH, LENGTH)
    want = branch_shares(scene.gradient, log_ratio, advantages, scene.mask, flipped)
    assert {name: updated(scene)[name] for name in want} == pytest.approx(want)


def test_the_tail_is_over_the_engine_s_log_probs(scene: Scene) -> None:
    want = ratio_tail(
        scene.new.logprobs, scene.batch.rollout_logprobs, scene.mask, prefix="rollout_ratio"
    )
    found = updated(scene)
    assert {name: found[name] for name in want} == pytest.approx(want)


def test_margin_and_shift_are_of_the_update_s_routers(scene: Scene) -> None:
    by_logits = torch.tensor([True, False, True])
    found = updated(scene, by_logits=by_logits)
    assert scene.new.router_logits is not None and scene.old.router_logits is not None
    for layer in range(LAYERS):
        gaps = [margin(scene.new.router_logits[b, t, layer]) for b, t in scene.tokens]
        want = fmean(gaps) if by_logits[layer] else math.nan
        got = found["routing/margin_per_layer"]
        assert isinstance(got, list) and got[layer] == pytest.approx(want, nan_ok=True)
    new = scene.new.router_logits.double().log_softmax(-1)
    old = scene.old.router_logits.double().log_softmax(-1)
    gammas = []
    for b, t in scene.tokens:
        moved = [
            abs(float(new[b, t, layer, e] - old[b, t, layer, e]))
            for layer in range(LAYERS)
            for e in chosen(scene.old.routed_experts, b, t, layer)
        ]
        gammas.append(math.exp(-fmean(moved)))
    assert found["routing/shift"] == pytest.approx(fmean(gammas))


@pytest.mark.parametrize("replayed", [False, True])
def test_the_routing_part_is_what_replay_takes_away(scene: Scene, replayed: bool) -> None:
    """Of a pass that was replayed the other one is live, and the reverse."""
    other = scene.logprobs()
    live, replay = (other, scene.new.logprobs) if replayed else (scene.new.logprobs, other)
    want = split_log_ratio(live, replay, scene.old.logprobs, scene.mask)
    found = updated(scene, other_logprobs=(other,), replayed=replayed)
    assert {name: found[name] for name in want} == pytest.approx(want)


def test_where_gate_weights_are_replayed_the_parts_are_of_the_ids(scene: Scene) -> None:
    live, ids = scene.logprobs(), scene.logprobs()
    own, old, mask = scene.new.logprobs, scene.old.logprobs, scene.mask
    want = split_log_ratio(live, ids, old, mask)
    want |= gate_statistics(live, ids, own, scene.batch.rollout_logprobs, mask)
    found = updated(scene, other_logprobs=(live, ids), replayed=True)
    assert {name: found[name] for name in want} == pytest.approx(want)


def test_the_value_loss_is_a_mean_over_response_tokens(scene: Scene) -> None:
    losses = torch.rand(BATCH, LENGTH, generator=scene.draw)
    found = updated(scene, value_losses=losses)
    assert found["value/loss"] == pytest.approx(fmean([float(losses[at]) for at in scene.tokens]))


def test_a_rollout_s_routing_is_the_old_policy_s(scene: Scene) -> None:
    by_logits = torch.tensor([True, True, False])
    found = rollout_metrics(scene.batch, scene.old, by_logits=by_logits)
    assert scene.old.router_logits is not None and scene.old.entropy is not None
    shares = scene.old.router_logits.double().softmax(-1)
    for layer in range(LAYERS):
        counts = [0] * EXPERTS
        mass, spread, gaps = [], [], []
        for b, t in scene.tokens:
            own = shares[b, t, layer].tolist()
            for expert in chosen(scene.old.routed_experts, b, t, layer):
                counts[expert] += 1
            mass.append(sum(own[e] for e in chosen(scene.old.routed_experts, b, t, layer)))
            spread.append(-sum(r * math.log(r) for r in own))
            gaps.append(margin(scene.old.router_logits[b, t, layer]))
        want = {
            "margin": fmean(gaps) if by_logits[layer] else math.nan,
            "confidence": fmean(mass),
            "entropy": fmean(spread),
            "load_cv": pstdev(counts) / fmean(counts),
            "max_vio": max(counts) / fmean(counts) - 1,
            "dead_experts": fmean(count == 0 for count in counts),
        }
        got = {name: found[f"routing/{name}_per_layer"][layer] for name in want}
        assert got == pytest.approx(want, rel=1e-5, nan_ok=True)
    entropy = fmean([float(scene.old.entropy[at]) for at in scene.tokens])
    assert found["entropy"] == pytest.approx(entropy)


def test_the_mismatch_is_of_the_trainer_and_the_engine(scene: Scene) -> None:
    found = mismatch_metrics(scene.batch, scene.old)
    want = mismatch_statistics(scene.old.logprobs, scene.batch.rollout_logprobs, scene.mask)
    assert {name: found[name] for name in want} == pytest.approx(want)
    differ = [
        chosen(scene.old.routed_experts, b, t, layer)
        != chosen(scene.batch.routed_experts, b, t, layer)
        for b, t in scene.tokens
        for layer in range(LAYERS)
    ]
    assert found["mismatch/router_disagreement"] == pytest.approx(fmean(differ))


def test_explained_variance_is_of_rewards_and_not_defined_where_they_are_equal(
    scene: Scene,
) -> None:
    values = torch.rand(BATCH, LENGTH, generator=scene.draw)
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.25])
    reward = [float(rewards[b]) for b, _ in scene.tokens]
    missed = [float(rewards[b] - values[b, t]) for b, t in scene.tokens]

    found = value_metrics(scene.batch, values, rewards)
    want = 1 - pvariance(missed) / pvariance(reward)
    assert found == {"value/explained_variance": pytest.approx(want)}
    (nothing,) = value_metrics(scene.batch, values, torch.ones(BATCH)).values()
    assert math.isnan(nothing)
