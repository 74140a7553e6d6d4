"""Which experts backend runs, and what training relies on in the one a CPU takes."""

from typing import Any

import pytest
import torch
from transformers import Qwen3MoeConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from moe_rl.experts import choose_experts, valid_experts


def test_a_cpu_gets_the_grouped_product_and_a_sentence_why() -> None:
    choice = choose_experts("cpu", "auto")
    assert choice.name == "grouped_mm" and "one grouped product" in choice.reason


def test_an_expert_without_tokens_gets_exactly_zero_gradient() -> None:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(hidden_size=16, moe_intermediate_size=8, num_experts=6)
    experts = Qwen3MoeExperts(config)
    experts.config._experts_implementation = choose_experts("cpu").name
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    index = torch.tensor([[0, 5], [5, 3]]).repeat(6, 1)
    experts(torch.randn(12, 16), index, torch.rand(12, 2)).sum().backward()
    for parameter in experts.parameters():
        sizes = parameter.grad.abs().flatten(1).amax(1)
        assert (sizes[[1, 2, 4]] == 0).all() and (sizes[[0, 3, 5]] > 0).all()


def test_a_backend_asked_for_by_name_is_taken(monkeypatch: Any) -> None:
    """One that is registered later as well."""
    mapping = type(ALL_EXPERTS_FUNCTIONS)._global_mapping
    monkeypatch.setitem(mapping, "another", lambda *_: None)
    for name in valid_experts():
        if name != "auto" and "megablocks" not in name:  # tested in test_megablocks.py
            assert choose_experts("cpu", name).name == name


def test_an_unknown_backend_is_an_error_that_lists_what_is_registered() -> None:
    with pytest.raises(ValueError, match="experts_implementation='fastest': unknown") as error:
        choose_experts("cpu", "fastest")
    for name in ("eager", *ALL_EXPERTS_FUNCTIONS.valid_keys()):
        assert name in str(error.value)
