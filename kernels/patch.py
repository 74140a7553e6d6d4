"""A `token_logprobs` method for any Hugging Face causal language model.

    with patch(model):
        logprobs = model.token_logprobs(input_ids, attention_mask=mask)

What a family does to its final logits (softcap, scale, bias) is read from its config, and then
checked: `patch` runs the model on four tokens and compares. A model whose logits are not what was
read is refused, so that the method is the model's own distribution or does not exist.
"""

import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from moe_rl.kernels.logprobs import TokenLogprobs, token_logprobs

_METHOD = "token_logprobs"
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


class Patch:
    """Undoes `patch`: by `remove()`, or as a context manager at the end of the block."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def remove(self) -> None:
        """Take the method off the model again. A second call does nothing."""
        self._model.__dict__.pop(_METHOD, None)

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def patch(model: nn.Module) -> Patch:
    """Give `model` a method `token_logprobs(input_ids, ...)` that never stores full logits.

    The method takes `[B, S]` ids and returns what `moe_rl.kernels.token_logprobs` returns:

        model.token_logprobs(
            input_ids, attention_mask=None, targets=None, temperature=1.0, ignore_index=-100,
            entropy=False, return_lse=False, backend="auto", **forward)

    Without `targets` the result is `[B, S - 1]`: token s + 1 given the tokens up to s, and 0 for
    tokens that the attention mask leaves out. With `targets` `[B, S]` position s is asked for
    targets[s]. `forward` goes to the model.

    Args:
        model: a causal LM of transformers, not wrapped, whose head is an `nn.Linear` (tied or not).

    Returns:
        The patch; its `remove()` undoes it.

    Raises:
        ValueError: no such head, an encoder-decoder, a model that has the method already, or final
            logits that are not a bounded or scaled linear function of the last hidden state.
    """
    name = type(model).__name__
    if hasattr(model, _METHOD):
        raise ValueError(
            f"model={name}: has a method {_METHOD} already; remove() the earlier patch"
        )
    final = _tried_logits(model)

    def method(
        self: Any,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        targets: Tensor | None = None,
        temperature: float | Tensor = 1.0,
        ignore_index: int | None = -100,
        entropy: bool = False,
        return_lse: bool = False,
        backend: str = "auto",
        **forward: Any,
    ) -> TokenLogprobs:
        """Log-probabilities of tokens under this model; see `moe_rl.kernels.patch`."""
        # Of this model now: a copy has a head of its own, and a head can be replaced.
        head = _head(self, name)
        padding = _target_of_padding(attention_mask, input_ids, targets, ignore_index)
        hidden = _hidden(self, input_ids, attention_mask=attention_mask, **forward)
        if targets is None:
            hidden, targets = hidden[:, :-1], input_ids[:, 1:]
            if attention_mask is not None:
                targets = targets.where(attention_mask[:, 1:].bool(), padding)
        return token_logprobs(
            hidden,
            head.weight,
            targets,
            bias=head.bias,
            temperature=temperature if final.scale == 1 else temperature / final.scale,
            softcap=final.softcap,
            ignore_index=ignore_index,
            entropy=entropy,
            return_lse=return_lse,
            backend=backend,
        )

    # Past nn.Module's own __setattr__, so that remove() finds it in one place.
    model.__dict__[_METHOD] = types.MethodType(method, model)
    return Patch(model)


def _target_of_padding(
    mask: Tensor | None, input_ids: Tensor, targets: Tensor | None, ignore_index: int | None
) -> int:
    if mask is None or targets is not None:
        return 0  # not asked for
    if mask.shape != input_ids.shape or ignore_index is None:
        raise ValueError(
            f"attention_mask={list(mask.shape)}, ignore_index={ignore_index}: which tokens count "
            f"is told by a mask of the shape of input_ids {list(input_ids.shape)} and a number to "
            "ignore; pass targets instead"
        )
    return ignore_index


def _head(model: Any, name: str) -> nn.Linear:
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


def _hidden(model: Any, input_ids: Tensor, **forward: Any) -> Tensor:
    """Last hidden states `[B, S, H]`, after the final norm."""
    output = model.base_model(input_ids=input_ids, **{"use_cache": False, **forward})
    hidden: Tensor = output.last_hidden_state
    return hidden


def final_logits(model: nn.Module) -> FinalLogits:
    """What a causal LM of transformers does to the logits of its head.

    Found by trying it, if its config speaks of more than the head.

    Raises:
        ValueError: see `patch`.
    """
    if list(_readings(model)) == [FinalLogits()]:
        return FinalLogits()
    return _tried_logits(model)


@torch.no_grad()
def _tried_logits(model: Any) -> FinalLogits:
    """The first reading of the config that reproduces the model's own logits."""
    name = type(model).__name__
    head = _head(model, name)
    ids = torch.arange(1, 1 + _PROBE_TOKENS, device=head.weight.device).remainder(len(head.weight))
    modes = {module: module.training for module in model.modules()}
    model.eval()  # dropout would make two passes differ
    try:
        own = model(input_ids=ids.unsqueeze(0), use_cache=False).logits.float()
        hidden = _hidden(model, ids.unsqueeze(0))
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
        f"model={name}: its final logits are all 0 or not those of its head under any of "
        f"{readings}; load its weights first, or call moe_rl.kernels.token_logprobs with what it "
        "does to its logits"
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
