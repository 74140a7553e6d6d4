"""The choice of the k largest is that of torch.topk, whatever the scores."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_rl.routing.top_k import largest, top_k

NUMBERS = st.sampled_from([-math.inf, -2.0, 0.0, 0.5, 0.5, 1.0, math.inf, math.nan])


@given(st.data(), st.integers(1, 9), st.integers(0, 4))
def test_values_are_those_of_topk_with_ties_nan_and_infinities(
    data: st.DataObject, experts: int, rows: int
) -> None:
    k = data.draw(st.integers(1, experts))
    values = data.draw(st.lists(NUMBERS, min_size=rows * experts, max_size=rows * experts))
    scores = torch.tensor(values).view(rows, experts)
    found, ids = top_k(scores, k)
    torch.testing.assert_close(found, scores.topk(k).values, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(scores.gather(-1, ids), found, rtol=0, atol=0, equal_nan=True)
    assert all(len(set(row)) == k for row in ids.tolist()), "an expert was chosen twice"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_indices_shape_dtype_and_gradient_are_those_of_topk(dtype: torch.dtype) -> None:
    scores = torch.randperm(3 * 5 * 2 * 32).view(3, 5, 2, 32).double().div(1000).to(dtype)
    upstream = torch.rand(5, 3, 2, 3).to(dtype)
    results = []
    for choose in (top_k, torch.topk):
        leaf = scores.clone().requires_grad_()
        values, ids = choose(leaf.transpose(0, 1), 3)
        values.backward(upstream)
        results.append((values.detach(), leaf.grad, ids))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    if dtype != torch.bfloat16:  # where scores are rounded to equal ones, either id will do
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert torch.equal(largest(scores, 3), scores.topk(3).values)


def test_of_equal_scores_the_lower_id_comes_first() -> None:
    assert top_k(torch.tensor([[1.0, 2.0, 2.0, 2.0]]), 2).indices.tolist() == [[1, 2]]
