"""Small Qwen3-MoE models with stock layers, in exact arithmetic, and on the fast path."""

from types import MethodType
from typing import Any

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

from moe_rl.cpu import FastPath


def stock(
    dtype: torch.dtype = torch.float64, experts: int = 6, top_k: int = 2, **sizes: int
) -> Any:
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, **sizes}
    config = Qwen3MoeConfig(
        vocab_size=19,
        hidden_size=16,
        intermediate_size=12,
        moe_intermediate_size=12,
        num_hidden_layers=2,
        **sizes,
        num_experts=experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=True,
        pad_token_id=None,
        eos_token_id=None,
        bos_token_id=None,
    )
    model = Qwen3MoeForCausalLM(config).to(dtype).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    model.set_experts_implementation("eager")
    return model


def exact(model: Any) -> Any:
    """Stock norms compute in float32 whatever the input; the reference must not."""

    def norm(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    for module in model.modules():
        if isinstance(module, Qwen3MoeRMSNorm):
            module.forward = MethodType(norm, module)
    return model


def fused(model: Any) -> Any:
    assert FastPath(model).install()
    return model


def forward_and_gradients(model: Any, ids: torch.Tensor, **kwargs: Any) -> list[torch.Tensor]:
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False, **kwargs).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (logits * weights.to(logits.dtype)).sum().backward()
    gradients = [p.grad for p in model.parameters()]
    assert all(g is not None for g in gradients)
    return [logits.detach(), *gradients]


def tokens(
    prompts: int, prompt_length: int, group: int, length: int, padded: bool, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prompt ids, prompt mask, response ids."""
    rng = torch.Generator().manual_seed(seed)
    mask = torch.ones(prompts, prompt_length, dtype=torch.bool)
    if padded:
        mask[0, : prompt_length - 1] = False
    return (
        torch.randint(0, 19, (prompts, prompt_length), generator=rng),
        mask,
        torch.randint(0, 19, (prompts * group, length), generator=rng),
    )
