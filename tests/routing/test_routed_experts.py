"""The checks of a record that came from elsewhere."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_rl.routing import check_routed_experts, replay_routing

SHAPE = {"num_layers": 2, "num_experts": 8, "top_k": 2}


def good() -> torch.Tensor:
    return torch.tensor([0, 5], dtype=torch.int16).expand(3, 4, 2, 2).clone()


def test_a_good_record_passes() -> None:
    routes = good()
    check_routed_experts(routes, **SHAPE)
    routes[0, 1:] = -1
    check_routed_experts(routes, **SHAPE)
    check_routed_experts(torch.full_like(routes, -1), **SHAPE)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((3, 4, 3, 2), torch.int32),
        ((3, 4, 2, 1), torch.int32),
        ((3, 8, 2), torch.int32),
        ((3, 4, 2, 2), torch.float32),
    ],
)
def test_a_record_of_another_model_or_of_no_integers_is_refused(shape, dtype) -> None:
    with pytest.raises(ValueError, match=r"shape is .*has 2 routers that choose 2 experts each"):
        check_routed_experts(torch.ones(shape, dtype=dtype), **SHAPE)


@pytest.mark.parametrize("value", [8, 300, -2])
def test_ids_out_of_range_are_refused(value) -> None:
    routes = good()
    routes[1, 2, 0, 1] = value
    with pytest.raises(ValueError, match=rf"{value}.*but the model has 8 experts"):
        check_routed_experts(routes, **SHAPE)


def test_a_token_that_names_an_expert_twice_is_refused() -> None:
    routes = good()
    routes[1, 2, 0] = 5
    with pytest.raises(ValueError, match=r"\[1, 2, 0\] holds \[5, 5\].*names an expert twice"):
        check_routed_experts(routes, **SHAPE)
    with pytest.raises(ValueError, match="every recorded id is 0, so the engine"):
        check_routed_experts(torch.zeros_like(routes), **SHAPE)


def test_validation_can_be_left_out(model, tokens) -> None:
    twice = torch.zeros(4, 7, 2, 2, dtype=torch.int16)
    with torch.no_grad(), replay_routing(model, twice, validate=False):
        model(tokens)
    with (
        pytest.raises(ValueError, match="shape"),
        replay_routing(model, twice[..., :1], validate=False),
    ):
        pass


@given(
    st.integers(1, 5).flatmap(
        lambda k: st.lists(
            st.lists(st.integers(-1, 6), min_size=k, max_size=k), min_size=1, max_size=6
        )
    )
)
def test_uniqueness_is_judged_like_sets(rows) -> None:
    routes = torch.tensor(rows).view(1, len(rows), 1, -1)
    top_k = routes.shape[-1]
    complete = [row for row in rows if min(row) >= 0]
    repeats = any(len(set(row)) < top_k for row in complete)
    zeros = max(max(row) for row in rows) == 0
    if repeats or zeros:
        with pytest.raises(ValueError):
            check_routed_experts(routes, num_layers=1, num_experts=7, top_k=top_k)
    else:
        check_routed_experts(routes, num_layers=1, num_experts=7, top_k=top_k)
