"""The one door to the fused layers: swap them in, out, and read prompts and responses with them.

An instance attribute `forward` shadows the class's: parameters, buffers, `state_dict`, hooks and
module names stay as they are, and deleting the attribute restores the stock layer.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeAttention,
    Qwen3MoeDecoderLayer,
    Qwen3MoeRMSNorm,
    Qwen3MoeRotaryEmbedding,
    Qwen3MoeTopKRouter,
)

from moe_rl.cpu.attention import attention_forward, plain_weights, runs
from moe_rl.cpu.decoder_layer import decoder_layer_forward
from moe_rl.cpu.group_cache import GroupCache
from moe_rl.cpu.one_pass import OnePass
from moe_rl.cpu.rms_norm import EXACT_DTYPES, rms_norm_forward
from moe_rl.cpu.rotary import TABLE, rotary_forward
from moe_rl.cpu.router import router_forward
from moe_rl.runtime.choice import Choice

_FUSED: dict[type[Any], Callable[..., Any]] = {
    Qwen3MoeRMSNorm: rms_norm_forward,
    Qwen3MoeAttention: attention_forward,
    Qwen3MoeDecoderLayer: decoder_layer_forward,
    Qwen3MoeRotaryEmbedding: rotary_forward,
    Qwen3MoeTopKRouter: router_forward,
}


class FastPath:
    """The CPU fast path of one model. It holds no state: make one wherever the model is at hand.

    Args:
        model: a causal LM of transformers; one without Qwen3-MoE layers is left as it is.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    @staticmethod
    def choose(device: torch.device, dtype: torch.dtype) -> Choice:
        """`fused` or `stock`: the layers that a model on `device` in `dtype` should run."""
        if device.type != "cpu":
            return Choice("stock", f"the fused layers are for CPUs, the model is on {device.type}")
        if dtype not in EXACT_DTYPES:
            return Choice("stock", f"fused layers sum in the type of the input, which is {dtype}")
        return Choice("fused", "on a CPU, in full precision, they pass over the data less often")

    def install(self) -> list[str]:
        """Run norms, attention, routers and decoder layers of a Qwen3-MoE through the fused code.

        Modules of other classes, or whose `forward` somebody else has replaced, are left alone, and
        so are the experts. A swapped module checks every call, and hands what it does not serve
        (16-bit floats, a foreign cache, hooks or adapters on what it would skip, gradient
        checkpointing of a layer) to its class.

        Returns:
            Names of the swapped modules, in module order; empty where `choose` says `stock`.
        """
        swapped: list[str] = []
        if self.choose(self.model.device, self.model.dtype).name == "stock":
            return swapped
        for name, module in self.model.named_modules():
            forward = _fused_forward(module)
            if forward is not None and "forward" not in vars(module):
                module.forward = MethodType(forward, module)
                swapped.append(name)
        return swapped

    def remove(self) -> list[str]:
        """Undo `install`; returns the names of the modules that were restored."""
        restored = []
        for name, module in self.model.named_modules():
            if any(runs(module, fused) for fused in _FUSED.values()):
                del module.forward
                vars(module).pop(TABLE, None)
                restored.append(name)
        return restored

    def is_installed(self) -> bool:
        """Whether every attention layer of the model runs the fused code (and there is one)."""
        layers = [m for m in self.model.modules() if isinstance(m, Qwen3MoeAttention)]
        # A model of several families' layers must not be read by code that knows one of them.
        counted = self.model.config.get_text_config(decoder=True).num_hidden_layers
        return len(layers) == counted and all(runs(layer, attention_forward) for layer in layers)

    def new_cache(self) -> GroupCache | DynamicCache:
        """An empty key-value cache: a `GroupCache` where installed, else a `DynamicCache`.

        Both take `batch_repeat_interleave(G)` after the prompts were read.
        """
        config = self.model.config
        if self.is_installed():
            return GroupCache(config.num_hidden_layers)
        return DynamicCache(config=config)

    def read_in_one_pass(
        self, prompt_ids: Tensor, response_ids: Tensor, prompt_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Hidden states of prompts and responses from one forward pass, with gradients.

        The model sees one sequence of batch 1: first the rows of all prompts, then those of all
        responses. Routers therefore see `[P * Sp + B * T]` tokens in that order, and a record or a
        replay of their choices has those positions. Only where `is_installed`: stock attention
        cannot tell the rows apart.

        Args:
            prompt_ids: int64 `[P, Sp]`, left padded.
            response_ids: int64 `[B, T]`, B = P * G, the responses to one prompt being neighbours.
            prompt_mask: bool `[P, Sp]`, False on padding; None where there is none.

        Returns:
            Last hidden states `[P, Sp, H]` and `[B, T, H]`.
        """
        prompts, prompt_length = prompt_ids.shape
        batch, length = response_ids.shape
        assert self.is_installed() and batch % prompts == 0, (batch, prompts)
        rows = OnePass(
            prompts=prompts,
            prompt_length=prompt_length,
            group=batch // prompts,
            length=length,
            prompt_mask=prompt_mask,
        )
        ids = torch.cat([prompt_ids.reshape(-1), response_ids.reshape(-1)]).unsqueeze(0)
        hidden = self.model.base_model(
            input_ids=ids,
            position_ids=rows.position_ids(),
            # Four axes: transformers takes it for a finished mask and builds none: `OnePass` masks.
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device),
            use_cache=False,
            one_pass=rows,
        ).last_hidden_state[0]
        of_prompts, of_responses = hidden.tensor_split([rows.prompt_rows])
        return of_prompts.view(*prompt_ids.shape, -1), of_responses.view(batch, length, -1)


def _fused_forward(module: nn.Module) -> Callable[..., Any] | None:
    if any(tensor.device.type != "cpu" for tensor in (*module.parameters(), *module.buffers())):
        return None
    for stock, fused in _FUSED.items():
        # A subclass with a forward of its own is another layer.
        if isinstance(module, stock) and type(module).forward is stock.forward:
            known = _KNOWN.get(stock)
            return fused if known is None or known(module) else None
    return None


def _plain_attention(attention: Any) -> bool:
    """Whether the attention has no bias, no sliding window, and heads of an even size."""
    return (
        plain_weights(attention, None) is not None
        and attention.sliding_window is None
        and attention.head_dim % 2 == 0
    )


def _fixed_angles(rotary: Any) -> bool:
    """Whether the angles of a position are always the same: other types change with the length."""
    return rotary.rope_type == "default"


_KNOWN: dict[type[Any], Callable[[Any], bool]] = {
    Qwen3MoeAttention: _plain_attention,
    Qwen3MoeRotaryEmbedding: _fixed_angles,
}
