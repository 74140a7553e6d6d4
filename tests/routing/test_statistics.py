"""Routing statistics against counting with Python sets."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_rl.routing import statistics as stats


@st.composite
def routings(draw):
    """Two routings `[N, L, K]` of E experts with gaps, a mask, and logits `[N, L, E]` for each."""
    experts = draw(st.integers(1, 6))
    top_k = draw(st.integers(1, experts))
    n, layers = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    logits = [3 * torch.randn(n, layers, experts, generator=generator) for _ in range(2)]
    ids = [x.topk(top_k, dim=-1).indices.to(torch.int16) for x in logits]
    for e in ids:
        e[torch.rand(n, layers, generator=generator) < 0.2] = -1
    mask = torch.rand(n, generator=generator) < 0.7
    return experts, top_k, ids, logits, mask


def counted(ids, mask, token: int, layer: int) -> bool:
    return bool(mask[token]) and all(bool((e[token, layer] >= 0).all()) for e in ids)


def same(a: float, b: float) -> bool:
    return (math.isnan(a) and math.isnan(b)) or math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-5)


@given(routings())
def test_churn_and_disagreement_are_those_of_sets(case) -> None:
    _, top_k, (a, b), _, mask = case
    share = stats.churn(a, b, mask)
    routers = stats.router_disagreement(share)
    tokens = stats.token_disagreement(share)
    for token in range(a.shape[0]):
        differs = []
        for layer in range(a.shape[1]):
            old, new = set(a[token, layer].tolist()), set(b[token, layer].tolist())
            counts = counted((a, b), mask, token, layer)
            assert same(share[token, layer].item(), len(new - old) / top_k if counts else math.nan)
            assert same(routers[token, layer].item(), float(old != new) if counts else math.nan)
            differs += [old != new] if counts else []
        assert same(tokens[token].item(), float(any(differs)) if differs else math.nan)


@given(routings())
def test_churn_is_symmetric_and_knows_no_order(case) -> None:
    _, _, (a, b), _, mask = case
    expected = stats.churn(a, b, mask)
    assert torch.equal(stats.churn(b, a, mask).nan_to_num(9), expected.nan_to_num(9))
    assert torch.equal(
        stats.churn(a.flip(-1), b.long(), mask).nan_to_num(9), expected.nan_to_num(9)
    )
    assert stats.churn(a, a, mask).nan_to_num(0).sum() == 0


@given(routings())
def test_a_layers_average_is_over_what_counts(case) -> None:
    _, _, (a, b), _, mask = case
    share = stats.churn(a, b, mask)
    for layer, mean in enumerate(stats.per_layer(share).tolist()):
        values = [x for x in share[:, layer].tolist() if not math.isnan(x)]
        assert same(mean, sum(values) / len(values) if values else math.nan)


@given(routings())
def test_margin_is_the_gap_at_the_boundary(case) -> None:
    experts, top_k, _, (logits, _), mask = case
    gaps = stats.margin(logits, top_k, mask)
    for token in range(logits.shape[0]):
        for layer in range(logits.shape[1]):
            order = sorted(logits[token, layer].tolist(), reverse=True)
            gap = math.inf if top_k == experts else order[top_k - 1] - order[top_k]
            assert same(gaps[token, layer].item(), gap if mask[token] else math.nan)


@given(routings())
def test_shift_confidence_and_entropy_follow_their_formulas(case) -> None:
    _, _, (a, _), (old, new), mask = case
    shifts = stats.router_shift_ratio(old, new, a, mask)
    masses, entropies = stats.confidence(new, a, mask), stats.entropy(new, mask)
    r_old, r_new = old.double().softmax(-1), new.double().softmax(-1)
    for token in range(a.shape[0]):
        moves = []
        for layer in range(a.shape[1]):
            chosen = a[token, layer].tolist()
            p = r_new[token, layer]
            counts = counted((a,), mask, token, layer)
            mass = sum(p[e].item() for e in chosen) if counts else math.nan
            spread = -sum(x * math.log(x) for x in p.tolist()) if mask[token] else math.nan
            assert same(masses[token, layer].item(), mass)
            assert same(entropies[token, layer].item(), spread)
            if counts:
                q = r_old[token, layer]
                moves.append(sum(abs(math.log(p[e] / q[e])) for e in chosen) / len(chosen))
        gamma = math.exp(-sum(moves) / len(moves)) if moves else math.nan
        assert same(shifts[token].item(), gamma)
    assert (stats.router_shift_ratio(old, old, a, mask).nan_to_num(1) == 1).all()


@given(routings())
def test_load_counts_the_slots_of_counted_tokens(case) -> None:
    experts, _, (a, _), _, mask = case
    got = stats.load(a, experts, mask)
    for layer in range(a.shape[1]):
        slots = [
            e
            for token in range(a.shape[0])
            if counted((a,), mask, token, layer)
            for e in a[token, layer].tolist()
        ]
        shares = [slots.count(e) / len(slots) if slots else math.nan for e in range(experts)]
        for e, share in enumerate(shares):
            assert same(got[layer, e].item(), share)
        mean = 1 / experts
        sd = math.sqrt(sum((x - mean) ** 2 for x in shares) / experts)
        assert same(stats.load_cv(got)[layer].item(), sd / mean)
        assert same(stats.max_vio(got)[layer].item(), max(shares) / mean - 1)
        dead = shares.count(0) / experts if slots else math.nan
        assert same(stats.dead_experts(got)[layer].item(), dead)


def test_extreme_loads_have_their_known_values() -> None:
    one_takes_all = torch.zeros(1, 5, 1, 1, dtype=torch.int16)
    got = stats.load(one_takes_all, 4)
    assert got.tolist() == [[1, 0, 0, 0]]
    assert stats.load_cv(got).item() == pytest.approx(math.sqrt(3))
    assert stats.max_vio(got).item() == 3
    assert stats.dead_experts(got).item() == 0.75
    even = stats.load(torch.arange(4).view(1, 4, 1, 1), 4)
    assert (stats.load_cv(even), stats.max_vio(even), stats.dead_experts(even)) == (0, 0, 0)


def test_token_axes_are_kept() -> None:
    a = torch.tensor([0, 1]).expand(3, 5, 2, 2)
    b = torch.tensor([2, 1]).expand(3, 5, 2, 2)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[0] = False
    share = stats.churn(a, b, mask)
    assert share.shape == (3, 5, 2)
    assert share.nanmean(dim=(0, 2)).tolist() == [0.5] * 5
    assert share[0].isnan().all()
    assert stats.token_disagreement(share).shape == (3, 5)
    assert stats.load(a, 3, mask).tolist() == [[0.5, 0.5, 0.0]] * 2


def test_a_dense_control_never_churns() -> None:
    a = torch.tensor([0, 1]).expand(4, 2, 2)
    assert stats.churn(a, a.flip(-1)).sum() == 0
    assert stats.router_disagreement(stats.churn(a, a.flip(-1))).sum() == 0
    logits = torch.randn(4, 2, 2)
    assert stats.margin(logits, 2).isinf().all()
    assert torch.allclose(stats.confidence(logits, a), torch.ones(4, 2))


def test_an_expert_that_cannot_be_chosen_adds_no_entropy() -> None:
    logits = torch.tensor([[[0.0, 0.0, -math.inf]]])
    assert stats.entropy(logits).item() == pytest.approx(math.log(2))


def test_positions_without_logits_do_not_count() -> None:
    logits = torch.full((1, 1, 4), math.nan)
    assert stats.margin(logits, 2).isnan().all()
    assert stats.entropy(logits).isnan().all()


def test_statistics_carry_no_gradient() -> None:
    logits = torch.randn(3, 2, 4, requires_grad=True)
    ids = torch.zeros(3, 2, 1, dtype=torch.int16)
    for got in (
        stats.margin(logits, 1),
        stats.entropy(logits),
        stats.confidence(logits, ids),
        stats.router_shift_ratio(logits, logits, ids),
    ):
        assert not got.requires_grad


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e, x, m: stats.churn(e, e[:1]), r"e_b: shape \[1, 2, 1\] differs from e_a"),
        (lambda e, x, m: stats.router_shift_ratio(x, x[:1], e), "new_logits: shape"),
        (lambda e, x, m: stats.churn(e, e, m[:1]), r"mask: torch.bool \[1\] for tokens \[3\]"),
        (lambda e, x, m: stats.entropy(x, m.float()), "pass a boolean mask"),
    ],
)
def test_misuse_is_refused_by_name(call, message) -> None:
    ids, logits = torch.zeros(3, 2, 1, dtype=torch.int16), torch.randn(3, 2, 4)
    with pytest.raises(ValueError, match=message):
        call(ids, logits, torch.ones(3, dtype=torch.bool))
