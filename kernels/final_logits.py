"""What a causal language model of transformers does to the logits of its head.

A family may scale them or cap them. Its config says so under one of several names, so each reading
of the config is tried on four tokens, and a model that none of them reproduces is refused.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

_SCALES = (
    *("logit_scale", "logits_scaling", "lm_head_multiplier"),
    "logits_mup_width_multiplier",
)
_PROBE_TOKENS = 4


@dataclass(frozen=True, kw_only=True)
class FinalLogits:
    """logits = cap(scale * (hidden @ weight.T + bias)); not both a cap and a scale."""

    scale: float = 1.0
    softcap: float | None = None

    def of_product(self, product: Tensor) -> Tensor:
        """The logits, of what the head gives."""
        logits = product if self.scale == 1 else product * self.scale
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()


def final_logits(model: nn.Module) -> FinalLogits:
    """What a causal LM of transformers does to its logits: tried only if its config speaks of it.

    Raises:
        ValueError: see `tried_logits`.
    """
    if list(_readings(model)) == [FinalLogits()]:
        return FinalLogits()
    return tried_logits(model)


@torch.no_grad()
def tried_logits(model: Any) -> FinalLogits:
    """The first reading of the config that reproduces the model's own logits.

    Raises:
        ValueError: no reading does, or there is no head (`output_head`).
    """
    head = output_head(model)
    ids = torch.arange(1, 1 + _PROBE_TOKENS, device=head.weight.device).remainder(len(head.weight))
    modes = {module: module.training for module in model.modules()}
    model.eval()  # dropout would make two passes differ
    try:
        own = model(input_ids=ids.unsqueeze(0), use_cache=False).logits.float()
        hidden = last_hidden(model, ids.unsqueeze(0))
    finally:
        for module, training in modes.items():
            module.training = training
    # The model's own logits are rounded to its dtype, once in the product and once by cap or scale.
    tolerance = 8 * torch.finfo(head.weight.dtype).eps * own.abs().max().item()
    readings = list(_readings(model))
    bias = None if head.bias is None else head.bias.float()
    product = F.linear(hidden.float(), head.weight.float(), bias)
    for reading in readings if own.any() else ():  # zeros would fit any scale or cap
        ours = reading.of_product(product)
        if ours.shape == own.shape and bool(((ours - own).abs() <= tolerance).all()):
            return reading
    raise ValueError(
        f"model={type(model).__name__}: its final logits are all 0 or not those of its head under "
        f"any of {readings}; load its weights first, or call moe_rl.kernels.token_logprobs with "
        "what it does to its logits"
    )


def _readings(model: Any) -> Iterator[FinalLogits]:
    """What the config may mean. Granite divides by `logits_scaling`, HyperCLOVA X multiplies.

    Inkling divides the hidden states, which the head, a product, does not see.
    """
    config = model.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    if cap:
        yield FinalLogits(softcap=float(cap))
    for name in _SCALES:
        value = getattr(config, name, None)
        if isinstance(value, int | float) and value > 0 and value != 1:
            yield FinalLogits(scale=float(value))
            yield FinalLogits(scale=1 / float(value))
    yield FinalLogits()


def output_head(model: Any) -> nn.Linear:
    """The head of a causal LM of transformers.

    Raises:
        ValueError: it has none that is one matrix product on the hidden states of a base model.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel) or model.config.is_encoder_decoder:
        raise ValueError(
            f"model={name}: not a causal LM of transformers; pass the model inside its wrapper"
        )
    head = model.get_output_embeddings()
    plain = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward
    if not plain or model.base_model is model:
        raise ValueError(
            f"model={name}: its output head {type(head).__name__} is not one matrix product on the "
            "hidden states of a base model; merge adapters or dequantise it into an nn.Linear first"
        )
    return head


def last_hidden(model: Any, input_ids: Tensor, **forward: Any) -> Tensor:
    """Last hidden states `[B, S, H]`, after the final norm."""
    output = model.base_model(input_ids=input_ids, **{"use_cache": False, **forward})
    hidden: Tensor = output.last_hidden_state
    return hidden
