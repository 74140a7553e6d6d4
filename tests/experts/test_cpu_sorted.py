"""The CPU experts: equal to the formula written out, for every shape, and exact about zeros."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Qwen3MoeConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from moe_rl.experts import choose_experts, valid_experts
from moe_rl.experts.cpu_sorted import cpu_sorted_experts_forward, run_experts

INPUTS = ("hidden_states", "top_k_weights", "gate_up_proj", "down_proj", "residual")


def written_out(
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    residual: Tensor | None,
) -> Tensor:
    rows = []
    for t in range(hidden.shape[0]):
        row = torch.zeros_like(hidden[t]) if residual is None else residual[t]
        for k in range(index.shape[1]):
            e = int(index[t, k])
            gate, up = (gate_up[e] @ hidden[t]).chunk(2)
            row = row + weights[t, k] * (down[e] @ (gate * torch.sigmoid(gate) * up))
        rows.append(row)
    return torch.stack(rows) if rows else hidden * 1.0


def draw(
    tokens: int = 9,
    experts: int = 5,
    top_k: int = 2,
    hidden: int = 8,
    width: int = 4,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, ...]:
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

    index = torch.rand(tokens, experts, generator=rng).argsort(dim=1)[:, :top_k]
    return (
        normal(tokens, hidden),
        index,
        normal(tokens, top_k),
        normal(experts, 2 * width, hidden),
        normal(experts, hidden, width),
        normal(tokens, hidden),
    )


def value_and_gradients(function: Any, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The output, and the gradients of the float inputs for a fixed upstream gradient."""
    leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    out = function(*leaves)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype)
    floats = [x for x in leaves if x.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, floats, upstream)]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape_has_the_value_and_gradients_of_the_formula(data: Any) -> None:
    experts = data.draw(st.integers(1, 7))
    inputs = draw(
        tokens=data.draw(st.integers(1, 12)),
        experts=experts,
        top_k=data.draw(st.integers(1, experts)),
        hidden=data.draw(st.integers(1, 9)),
        width=data.draw(st.integers(1, 9)),
        seed=data.draw(st.integers(0, 100)),
    )
    ours = value_and_gradients(run_experts, inputs)
    theirs = value_and_gradients(written_out, inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("hidden", "width"), [(16, 8), (10, 6)])
def test_float32_is_within_rounding_of_the_formula(hidden: int, width: int) -> None:
    """Sizes that torch's grouped product takes, and sizes it does not."""
    inputs = draw(40, 6, 2, hidden, width, dtype=torch.float32)
    ours = value_and_gradients(run_experts, inputs)
    exact = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    for a, b in zip(ours, value_and_gradients(written_out, exact), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


def test_bfloat16_is_as_close_to_the_formula_as_stock_experts() -> None:
    module = stock_experts(torch.bfloat16)
    hidden, index, weights = draw(64, 6, 2, 16, 8, dtype=torch.bfloat16)[:3]
    parameters = (module.gate_up_proj, module.down_proj)
    with torch.no_grad():
        exact = written_out(
            hidden.double(), index, weights.double(), *(p.double() for p in parameters), None
        )
        module.config._experts_implementation = "eager"
        stock = (module(hidden, index, weights).double() - exact).norm()
        ours = cpu_sorted_experts_forward(module, hidden, index, weights)
    assert (ours.double() - exact).norm() <= 2 * stock


def stock_experts(dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "moe_intermediate_size": 8, "num_experts": 6}
    module = Qwen3MoeExperts(Qwen3MoeConfig(**sizes, **config))
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module.to(dtype)


def test_experts_of_another_kind_are_computed_as_stock_does() -> None:
    """A GELU gate, for one, is not the formula of this code."""
    module = stock_experts(hidden_act="gelu")
    hidden, index, weights = draw(20, 6, 2, 16, 8, dtype=torch.float32)[:3]
    with torch.no_grad():
        ours = cpu_sorted_experts_forward(module, hidden, index, weights)
        module.config._experts_implementation = "eager"
        torch.testing.assert_close(ours, module(hidden, index, weights), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_expert_without_tokens_gets_exactly_zero_gradient(dtype: torch.dtype) -> None:
    inputs = list(draw(12, 6, 2, 16, 8, dtype=dtype))
    inputs[1] = torch.tensor([[0, 5], [5, 3]]).repeat(6, 1)
    gradients = value_and_gradients(run_experts, tuple(inputs))
    for gradient in gradients[3:5]:
        assert gradient[[1, 2, 4]].abs().max() == 0
        assert bool((gradient[[0, 3, 5]].abs().flatten(1).max(1).values > 0).all())


@pytest.mark.parametrize("top_k", [2, 5])
@pytest.mark.parametrize("wanted", range(len(INPUTS)), ids=INPUTS)
def test_a_gradient_does_not_depend_on_which_others_are_wanted(wanted: int, top_k: int) -> None:
    inputs = draw(top_k=top_k)
    every = value_and_gradients(run_experts, inputs)[1 + wanted]
    floats = [0, 2, 3, 4, 5]
    leaves = [x.clone().requires_grad_(i == floats[wanted]) for i, x in enumerate(inputs)]
    out = run_experts(*leaves)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype)
    out.backward(upstream)
    for i, leaf in enumerate(leaves):
        assert (leaf.grad is not None) == (i == floats[wanted])
    torch.testing.assert_close(leaves[floats[wanted]].grad, every, rtol=0, atol=0)


def test_frozen_experts_are_not_multiplied_for_a_gradient(monkeypatch: Any) -> None:
    from moe_rl.experts import cpu_sorted

    calls = []
    product = cpu_sorted._outer_by_expert
    monkeypatch.setattr(
        cpu_sorted, "_outer_by_expert", lambda *args: calls.append(1) or product(*args)
    )
    inputs = draw()
    hidden = inputs[0].requires_grad_()
    run_experts(hidden, *inputs[1:]).sum().backward()
    assert hidden.grad is not None
    assert calls == []


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_results_repeat_bitwise(top_k: int) -> None:
    inputs = draw(200, 5, top_k, 16, 8, dtype=torch.float32)
    first, second = (value_and_gradients(run_experts, inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_values_with_and_without_a_graph_are_the_same_bitwise() -> None:
    inputs = draw(50, 6, 2, 16, 8, dtype=torch.float32)
    with torch.no_grad():
        without = run_experts(*inputs)
    assert torch.equal(without, value_and_gradients(run_experts, inputs)[0])


def test_no_tokens_give_no_rows() -> None:
    inputs = draw(tokens=0)
    value, *gradients = value_and_gradients(run_experts, inputs)
    assert value.shape == (0, 8)
    assert all(g.abs().sum() == 0 for g in gradients)


@pytest.mark.parametrize("top_k", [2, 5])
@pytest.mark.parametrize("bad", [-1, 5])
def test_an_id_outside_the_experts_is_refused(bad: int, top_k: int) -> None:
    inputs = draw(top_k=top_k)
    inputs[1][3, 0] = bad
    with pytest.raises(ValueError, match=rf"top_k_index has expert ids.*{bad}.*0\.\.4"):
        run_experts(*inputs)


def test_the_cpu_gets_sorted_experts_and_a_sentence_why() -> None:
    choice = choose_experts("cpu", "auto")
    assert choice.name == "cpu_sorted" and "on a CPU" in choice.reason
    assert choose_experts(torch.device("cuda", 1)).name != "cpu_sorted"


def test_a_backend_asked_for_by_name_is_taken() -> None:
    for name in valid_experts():
        if name != "auto" and "megablocks" not in name:  # tested in test_megablocks.py
            assert choose_experts("cpu", name).name == name


def test_an_unknown_backend_is_an_error_that_lists_what_is_registered() -> None:
    with pytest.raises(ValueError) as error:
        choose_experts("cpu", "fastest")
    for name in ("'fastest'", "eager", *ALL_EXPERTS_FUNCTIONS.valid_keys()):
        assert name in str(error.value)


def test_a_backend_registered_later_becomes_valid(monkeypatch: Any) -> None:
    assert "another" not in valid_experts()
    mapping = type(ALL_EXPERTS_FUNCTIONS)._global_mapping
    monkeypatch.setitem(mapping, "another", cpu_sorted_experts_forward)
    assert choose_experts("cpu", "another").name == "another"
