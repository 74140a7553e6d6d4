"""`patch`: the method is the model's own distribution, or the model is refused by name."""

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from moe_rl.kernels import patch

SMALL = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "untied head": (
        "Qwen3Moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8},
    ),
    "tied embeddings": ("Qwen3", {"tie_word_embeddings": True, "head_dim": 8}),
    "softcap": ("Gemma2", {"final_logit_softcapping": 1.5, "head_dim": 8}),
    "divided logits": ("Granite", {"logits_scaling": 8.0}),
    "scaled logits": ("Cohere", {"logit_scale": 0.25}),
    "bias": ("Phi", {"num_key_value_heads": 2}),
}


def build(name: str, extra: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **extra})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # logits far from 0, so that caps and scales show
            if parameter.ndim > 1:
                parameter.mul_(8)
        head = model.get_output_embeddings()
        if head.bias is not None:
            head.bias.normal_()
    return model


def own(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    log_p = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    return log_p.gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", ["reference", "chunked", "triton"])
def test_the_method_is_the_models_own_distribution(family: str, backend: str) -> None:
    model = build(*FAMILIES[family])
    ids = torch.randint(3, 61, (2, 7), generator=torch.Generator().manual_seed(1))
    expected = own(model, ids)
    expected.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with patch(model):
        logprobs = model.token_logprobs(ids, backend=backend).logprobs
    torch.testing.assert_close(logprobs, expected, rtol=1e-4, atol=1e-4)
    logprobs.sum().backward()
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(
                *(parameter.grad, gradients[name]), rtol=1e-3, atol=2e-3, msg=name
            )


def test_padding_gives_zeros_and_targets_can_be_given() -> None:
    model = build(*FAMILIES["untied head"])
    ids = torch.randint(3, 61, (2, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    with patch(model), torch.no_grad():
        logprobs, entropy, _ = model.token_logprobs(ids, attention_mask=mask, entropy=True)
        given = model.token_logprobs(ids, targets=ids.roll(-1, 1), attention_mask=mask).logprobs
    assert (logprobs[1, 3:] == 0).all() and (entropy[1, 3:] == 0).all()
    kept = mask[:, 1:].bool()
    torch.testing.assert_close(logprobs[kept], own(model, ids, mask)[kept], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(given[:, :-1][kept], logprobs[kept], rtol=1e-4, atol=1e-5)


def test_the_patch_comes_off_and_does_not_go_on_twice() -> None:
    model = build(*FAMILIES["softcap"])
    model.train()
    handle = patch(model)
    assert model.training
    with pytest.raises(ValueError, match="Gemma2ForCausalLM: has a method token_logprobs already"):
        patch(model)
    handle.remove()
    handle.remove()
    assert not hasattr(model, "token_logprobs")
    patch(model).remove()


def test_a_model_that_bends_its_logits_in_another_way_is_refused() -> None:
    model = build(*FAMILIES["untied head"])
    forward = model.forward

    def bent(**kwargs: Any) -> Any:
        output = forward(**kwargs)
        output.logits = output.logits.clamp(max=0.1)
        return output

    model.forward = bent
    with pytest.raises(ValueError, match="Qwen3MoeForCausalLM: its final logits are all 0 or not"):
        patch(model)
    assert not hasattr(model, "token_logprobs")


def test_heads_that_are_more_than_a_matrix_are_refused() -> None:
    class Adapted(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1

    model = build(*FAMILIES["untied head"])
    model.set_output_embeddings(Adapted(16, 61))
    with pytest.raises(ValueError, match="output head Adapted"):
        patch(model)
    with pytest.raises(ValueError, match="model=Linear: not a causal LM"):
        patch(nn.Linear(2, 2))
    small = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
    with pytest.raises(ValueError, match="not a causal LM"):
        patch(transformers.T5ForConditionalGeneration(transformers.T5Config(**small)))


def test_a_copy_and_a_new_head_are_read_anew() -> None:
    """A reference policy is made by a copy; its head must not be the original's."""
    model = build(*FAMILIES["untied head"])
    ids = torch.randint(3, 61, (2, 6), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), patch(model):
        reference = copy.deepcopy(model)
        model.lm_head.weight.normal_()
        torch.testing.assert_close(reference.token_logprobs(ids).logprobs, own(reference, ids))
        torch.testing.assert_close(model.token_logprobs(ids).logprobs, own(model, ids))
        model.set_output_embeddings(nn.Linear(16, 61, bias=True))
        torch.testing.assert_close(model.token_logprobs(ids).logprobs, own(model, ids))
        model.set_output_embeddings(nn.Sequential(model.lm_head))
        with pytest.raises(ValueError, match="its output head Sequential"):
            model.token_logprobs(ids)


def test_a_head_without_weights_is_refused() -> None:
    """Any scale and any cap fit logits of 0."""
    model = build(*FAMILIES["divided logits"])
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    with pytest.raises(ValueError, match="its final logits are all 0"):
        patch(model)


def test_modes_of_parts_are_left_as_they_were() -> None:
    model = build(*FAMILIES["untied head"]).train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    patch(model).remove()
    assert [module.training for module in model.modules()] == before


def test_what_stands_around_a_model_is_refused() -> None:
    model = build(*FAMILIES["untied head"])
    wrapped = nn.DataParallel(model)
    wrapped.config, wrapped.get_output_embeddings = model.config, model.get_output_embeddings
    with pytest.raises(ValueError, match="model=DataParallel: not a causal LM"):
        patch(wrapped)


def test_a_mask_that_names_no_tokens_is_refused() -> None:
    model = build(*FAMILIES["untied head"])
    ids = torch.randint(3, 61, (2, 6))
    with patch(model):
        with pytest.raises(ValueError, match=r"attention_mask=\[2, 1, 6, 6\].* input_ids \[2, 6\]"):
            model.token_logprobs(ids, attention_mask=torch.ones(2, 1, 6, 6))
        with pytest.raises(ValueError, match="ignore_index=None"):
            model.token_logprobs(ids, attention_mask=torch.ones_like(ids), ignore_index=None)
