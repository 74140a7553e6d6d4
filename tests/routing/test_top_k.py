"""The k largest scores are those of torch.topk, whatever the scores."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_rl.routing.top_k import largest

NUMBERS = st.sampled_from([-float("inf"), -2.0, 0.0, 0.5, 0.5, 1.0, float("inf")])


@given(st.data(), st.integers(1, 9), st.integers(0, 4))
def test_values_are_those_of_topk_with_ties_and_infinities(
    data: st.DataObject, experts: int, rows: int
) -> None:
    k = data.draw(st.integers(1, experts))
    values = data.draw(st.lists(NUMBERS, min_size=rows * experts, max_size=rows * experts))
    scores = torch.tensor(values).view(rows, experts)
    assert torch.equal(largest(scores, k), scores.topk(k).values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shape_dtype_and_the_scores_themselves_are_kept(dtype: torch.dtype) -> None:
    scores = torch.randn(3, 5, 2, 32).to(dtype).requires_grad_()
    before = scores.detach().clone()
    found = largest(scores.transpose(0, 1), 3)
    assert torch.equal(found, scores.transpose(0, 1).topk(3).values)
    assert found.dtype == dtype and not found.requires_grad
    assert torch.equal(scores, before)
