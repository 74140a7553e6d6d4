"""A `token_logprobs` method for any Hugging Face causal language model.

    with patch(model):
        logprobs = model.token_logprobs(input_ids, attention_mask=mask)

What the model does to its final logits (softcap, scale) is found by running it on four tokens
(`final_logits.py`), so that the method is the model's own distribution or does not exist.
"""

import types
from typing import Any

from torch import Tensor, nn

from moe_rl.kernels.final_logits import last_hidden, output_head, tried_logits
from moe_rl.kernels.logprobs import TokenLogprobs, token_logprobs

_METHOD = "token_logprobs"


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
    final = tried_logits(model)

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
        head = output_head(self)
        padding = _target_of_padding(attention_mask, input_ids, targets, ignore_index)
        hidden = last_hidden(self, input_ids, attention_mask=attention_mask, **forward)
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
