"""Stands in for Qwen3-MoE attention's `forward`: reads the call, runs `attention_block`."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_rl.cpu.attention_block import BlockWeights, FoldedWeights, attention_block, fold_weights
from moe_rl.cpu.group_attention import Segment, attend, segments_of, spread_rows
from moe_rl.cpu.group_cache import GroupCache, GroupCacheLayer
from moe_rl.cpu.heads import HeadShape, Part, lay_out, project
from moe_rl.cpu.one_pass import OnePass
from moe_rl.cpu.parts import PositionEmbeddings, cached_part, sequence_part
from moe_rl.cpu.rms_norm import EXACT_DTYPES, inverse_rms
from moe_rl.kernels.product import product, product_plus

# Scores are held whole; beyond this many positions stock SDPA's blockwise kernel is the better one.
_LONGEST_WITHOUT_CACHE = 512

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class Call(NamedTuple):
    """The tensors of one call of an attention module, or of the first half of a layer."""

    hidden: Tensor
    """`[B, T, H]`."""
    positions: PositionEmbeddings
    """cos and sin `[1 or B, T, D]`."""
    mask: Tensor | None
    cache: Any
    one_pass: OnePass | None


def attention_forward(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: PositionEmbeddings,
    attention_mask: Tensor | None,
    past_key_values: Any = None,
    one_pass: OnePass | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of `[B, T, H]` with no cache or a `GroupCache`, or of the rows of a `OnePass`.

    Anything else goes to the class's own `forward`.
    """
    call = Call(hidden_states, position_embeddings, attention_mask, past_key_values, one_pass)
    weights = plain_weights(self, None)
    if not serves(self, weights, call) or weights is None:
        return type(self).forward(
            self,
            hidden_states,
            position_embeddings,
            attention_mask,
            past_key_values,
            **kwargs,
        )
    return run_block(self, weights, call), None


def plain_weights(attention: nn.Module, norm: nn.Module | None) -> BlockWeights | None:
    """The module's parameters, or None where something other than a plain product uses them.

    Adapters and parametrizations replace a projection's class or hide its weight; hooks on a
    submodule would not run, as the block does not call it.
    """
    # Straight from the registries: nn.Module's attribute lookup is most of a small call's cost.
    modules = attention._modules
    found: list[Tensor] = []
    for name in _PROJECTIONS:
        module = modules[name]
        if type(module) is not nn.Linear or module._parameters["bias"] is not None:
            return None
        if hooked(module):
            return None
        found.append(module._parameters["weight"])  # type: ignore[arg-type]
    norms = (modules["q_norm"], modules["k_norm"], norm)
    if any(module is not None and hooked(module) for module in norms):
        return None
    q, k, v, o = found
    q_norm, k_norm, first = (None if m is None else m._parameters["weight"] for m in norms)
    return BlockWeights(q, k, v, q_norm, k_norm, o, first)  # type: ignore[arg-type]


def runs(module: Any, forward: Any) -> bool:
    """Whether a module runs the given swapped forward."""
    return getattr(vars(module).get("forward"), "__func__", None) is forward


def hooked(module: nn.Module) -> bool:
    """Whether a module has hooks, which do not run where its weights are used without a call."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def serves(attention: Any, weights: BlockWeights | None, call: Call) -> bool:
    """Whether the fused maths is stock maths for this call.

    Raises:
        ValueError: it is not, but the call is one that stock code cannot serve either.
    """
    hidden, mask = call.hidden, call.mask
    ours = call.one_pass is not None or isinstance(call.cache, GroupCache)
    if not ours and (call.cache is not None or hidden.shape[1] > _LONGEST_WITHOUT_CACHE):
        return False
    exact = (
        weights is not None
        and hidden.device.type == "cpu"
        and hidden.dtype in EXACT_DTYPES
        and weights.q.dtype == hidden.dtype
        and attention.config._attn_implementation == "sdpa"
        and (mask is None or mask.dtype == torch.bool)
        and not (attention.training and attention.attention_dropout > 0)
        and not torch.is_autocast_enabled(hidden.device.type)
    )
    if ours and not exact:
        raise ValueError(
            f"past_key_values=GroupCache or one_pass, with {hidden.dtype} input on {hidden.device} "
            f"and {attention.config._attn_implementation} attention: needs float32 or float64 on a "
            "CPU, projections without adapters or hooks, sdpa attention, a boolean mask, no "
            "autocast and no attention dropout; call FastPath(model).remove() first"
        )
    return exact


def run_block(attention: Any, weights: BlockWeights, call: Call, norm_eps: float = 0.0) -> Tensor:
    """`attention_block` for a call that `serves` has accepted."""
    shape = HeadShape(
        kv_heads=weights.k.shape[0] // attention.head_dim,
        repeats=attention.num_key_value_groups,
        head_dim=attention.head_dim,
        scaling=attention.scaling,
        eps=attention._modules["q_norm"].variance_epsilon,
    )
    layer = None if call.cache is None else call.cache.layers[attention.layer_idx]
    prompt = None if layer is None else layer.prompt
    hidden = call.hidden.reshape(-1, call.hidden.shape[-1])
    graph = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (hidden, *weights, *(prompt or ()))
    )
    parts = _parts(call, layer, graph)
    if graph:
        out, keys, values = attention_block(hidden, weights, prompt, shape, parts, norm_eps)
        if layer is not None and prompt is None:
            layer.set_prompt(keys.flatten(2, 3), values.flatten(2, 3))
        elif layer is not None:
            layer.hold(keys.detach(), values.detach())
    else:
        out = _without_graph(hidden, weights, shape, parts, norm_eps, layer)
    return out.view(call.hidden.shape)


def _parts(call: Call, layer: GroupCacheLayer | None, graph: bool) -> tuple[Part, ...]:
    if call.one_pass is not None:
        return call.one_pass.parts(call.positions, call.hidden)
    if layer is None:
        return (sequence_part(call.positions, call.mask, call.hidden),)
    batch = call.hidden.shape[0]
    assert layer.prompt is None or batch == layer.sequences, (batch, layer.sequences)
    # The prompts' gradient comes from one continuation: pass the whole response at once.
    assert not (graph and layer.response_length), "a second continuation with gradients"
    in_blocks = layer.prompt is not None and not graph
    part = cached_part(
        call.cache, layer, call.positions, call.mask, call.hidden, in_blocks=in_blocks
    )
    return (part,)


def _without_graph(
    hidden: Tensor,
    weights: BlockWeights,
    shape: HeadShape,
    parts: tuple[Part, ...],
    eps: float,
    layer: GroupCacheLayer | None,
) -> Tensor:
    folded = _folded(weights, shape, layer)
    rows = hidden if weights.norm is None else hidden * inverse_rms(hidden, eps)
    laid = lay_out(project(rows, folded.heads.joined, shape), folded.heads, parts, shape)
    out = hidden.new_empty(hidden.shape[0], shape.queries * shape.head_dim)
    prompt = None if layer is None else layer.prompt
    for part, (queries, keys, values) in zip(parts, laid, strict=True):
        if layer is not None and prompt is not None:
            layer.append(keys, values)
            segments = _cached_segments(layer, part, prompt)
        else:
            segments = segments_of(part, keys, values, prompt)
        attend(queries, segments, folded.heads.bits, spread_rows(out, part, shape))
        prompt = (keys.flatten(2, 3), values.flatten(2, 3))
        if layer is not None and layer.prompt is None:
            layer.set_prompt(*prompt)
    if weights.norm is None:
        return product(out, folded.o)
    return product_plus(out, folded.o, hidden)


def _cached_segments(
    layer: GroupCacheLayer, part: Part, prompt: tuple[Tensor, Tensor]
) -> list[Segment]:
    segments, start = [Segment(*prompt, part.prompt_mask)], 0
    for keys, values in layer.blocks:
        end = start + keys.shape[3]
        mask = None if part.own_mask is None else part.own_mask[..., start:end]
        segments.append(Segment(keys, values, mask))
        start = end
    return segments


def _folded(
    weights: BlockWeights, shape: HeadShape, layer: GroupCacheLayer | None
) -> FoldedWeights:
    """The folded weights; with a cache, folded once for as long as nobody writes to them."""
    if layer is None:
        return fold_weights(weights, shape)
    present = [weight for weight in weights if weight is not None]
    return layer.prepared(present, lambda: fold_weights(weights, shape))
