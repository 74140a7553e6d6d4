"""What two readings differ in, against hand-made ones and formulas written out."""

import math

import pytest
import torch
from torch import Tensor

from moe_rl.audit.difference import Reading, compare_readings

B, T, L, K, E, G = 6, 10, 3, 2, 8, 2


def drawn(seed: int = 0) -> tuple[Reading, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    routes = torch.rand(B, T, L, E, generator=rng).topk(K, dim=-1).indices.to(torch.int16)
    logprobs = -torch.rand(B, T, generator=rng)
    mask = torch.arange(T) < torch.tensor([10, 4, 7, 10, 1, 9])[:, None]
    return Reading(logprobs=logprobs, routes=routes), mask


def other_set(routes: Tensor) -> Tensor:
    """A set of experts that shares all but one with the given one."""
    changed = routes.clone()
    taken = set(routes.tolist())
    changed[0] = next(e for e in range(E) if e not in taken)
    return changed


def test_a_reading_does_not_differ_from_itself_in_another_order() -> None:
    own, mask = drawn()
    found = compare_readings(
        own, Reading(logprobs=own.logprobs, routes=own.routes.flip(-1)), mask, group_size=G
    )
    assert found.churn == found.router_disagreement == found.token_disagreement == 0
    assert found.live.kl_k3 == found.live.largest == found.not_finite == 0
    assert math.isnan(found.removed) and found.tokens == mask.sum()


def test_a_flip_is_counted_where_it_is() -> None:
    own, mask = drawn()
    routes = own.routes.clone()
    routes[0, 3, 1] = other_set(routes[0, 3, 1])
    routes[1, 8, 0] = other_set(routes[1, 8, 0])  # outside of the mask
    found = compare_readings(own, Reading(logprobs=own.logprobs, routes=routes), mask, group_size=G)
    tokens = int(mask.sum())
    assert found.token_disagreement == pytest.approx(1 / tokens)
    assert found.router_disagreement == pytest.approx(1 / (tokens * L))
    assert found.churn == pytest.approx(1 / (tokens * L * K))
    assert found.routers_by_layer == pytest.approx([0, 1 / tokens, 0])
    by_position = {first: share for first, last, share in found.routers_by_position}
    assert by_position[3] == pytest.approx(1 / (L * int(mask[:, 3].sum())))
    assert sum(by_position.values()) == by_position[3]


def test_kl_and_its_error_are_those_of_the_formulas() -> None:
    own, mask = drawn()
    rng = torch.Generator().manual_seed(5)
    other = Reading(logprobs=own.logprobs + torch.randn(B, T, generator=rng), routes=own.routes)
    live = compare_readings(own, other, mask, group_size=G).live
    prompts = [
        [
            float(other.logprobs[b, t].double() - own.logprobs[b, t].double())
            for b in range(G * prompt, G * (prompt + 1))
            for t in range(T)
            if mask[b, t]
        ]
        for prompt in range(B // G)
    ]

    def k3(groups: list[list[float]]) -> float:
        values = [math.exp(x) - 1 - x for group in groups for x in group]
        return sum(values) / len(values)

    left_out = [k3(prompts[:i] + prompts[i + 1 :]) for i in range(len(prompts))]
    mean = sum(left_out) / len(left_out)
    error = math.sqrt(sum((x - mean) ** 2 for x in left_out) * (len(left_out) - 1) / len(left_out))
    assert live.kl_k3 == pytest.approx(k3(prompts))
    assert live.kl_k3_error == pytest.approx(error)
    every = [x for group in prompts for x in group]
    assert live.kl_k1 == pytest.approx(-sum(every) / len(every))
    assert live.extreme_2 == pytest.approx(sum(abs(x) > math.log(2) for x in every) / len(every))
    assert live.largest == pytest.approx(max(map(abs, every)))


def test_replay_removes_what_it_removes() -> None:
    own, mask = drawn()
    half = Reading(logprobs=own.logprobs + 0.001, routes=own.routes)
    other = Reading(logprobs=own.logprobs + 0.002, routes=own.routes)
    found = compare_readings(own, other, mask, group_size=G, same_routes=(own, half))
    assert found.removed == pytest.approx(0.75, abs=0.01)  # k3 of a small x is x^2 / 2


def test_flips_lie_in_the_tenth_of_their_margins() -> None:
    own, mask = drawn()
    margins = torch.rand(B, T, L, generator=torch.Generator().manual_seed(1))
    smallest = margins.masked_fill(~mask[..., None], 2.0).flatten().argsort()
    count = int(mask.sum()) * L // 10
    routes = own.routes.clone().view(-1, K)
    for place in smallest[:count].tolist():
        routes[place] = other_set(routes[place])
    other = Reading(logprobs=own.logprobs, routes=routes.view_as(own.routes))
    found = compare_readings(own, other, mask, group_size=G, margins=margins)
    values, flips = zip(*found.flips_by_margin, strict=True)
    assert list(values) == sorted(values) and len(values) == 10
    assert flips[0] > 0.9 and sum(flips[2:]) == 0


def test_log_probs_that_are_no_numbers_are_counted_and_left_out() -> None:
    own, mask = drawn()
    logprobs = own.logprobs.clone()
    logprobs[0, 0], logprobs[3, 2] = torch.nan, -torch.inf
    logprobs[4, 5] = torch.nan  # padding
    found = compare_readings(own, Reading(logprobs=logprobs, routes=own.routes), mask, group_size=G)
    assert found.not_finite == pytest.approx(2 / int(mask.sum()))
    assert found.live.kl_k3 == 0
