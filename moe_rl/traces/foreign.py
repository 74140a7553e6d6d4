"""Traces: arrays of routes as other systems write them, made into the record `[B, S, L, K]`.

| system                                   | what it gives, per sequence of S tokens               |
|------------------------------------------|-------------------------------------------------------|
| vLLM 0.14 `routed_experts`               | int32 `[S-1, all layers, K]`                          |
| vLLM 0.21 `prompt_routed_experts` and    | int16 `[P, L, K]` and `[G, L, K]`, -1 where a cached  |
|   `routed_experts`                       |   prefix was not run again                            |
| vLLM 0.22 and later `routed_experts`     | uint8 or int16 `[S-1, L, K]`                          |
| SGLang `meta_info["routed_experts"]`     | flat bytes `[S-1, all layers, K]`                     |
| prime-rl `routed_experts`                | an object with data, shape, dtype and start           |
| NeMo-RL `message["routed_experts"]`      | an envelope `[S, L, K]`, the last row a filler        |
| Megatron-LM router trace                 | JSONL, one line per pass and layer: `megatron.py`     |

How one array is written as text: `encodings.py`.

The last token is sampled and never fed, so no engine has a route for it: its row is -1 here.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_rl.routing.routed_experts import NO_RECORD, check_routed_experts
from moe_rl.routing.taps import find_routers

KEY = "routed_experts"
_LARGEST_ID = torch.iinfo(torch.int16).max


MTP = (
    ", without the last of this one if that is a multi-token-prediction layer, which training does "
    "not run"
)


def stack_rows(rows: Sequence[np.ndarray]) -> Tensor:
    """Stack routes `[S_i, L, K]` of B sequences into int16 `[B, S, L, K]`, short rows padded by -1.

    Raises:
        ValueError: no rows; a row is empty or not an integer array of three axes; rows differ in
            L or K; or an id does not fit int16.
    """
    if len({row.shape[1:] for row in rows}) != 1 or any(
        row.ndim != 3 or row.dtype.kind not in "iu" or not row.size for row in rows
    ):
        found = sorted({f"{row.dtype} {list(row.shape)}" for row in rows})
        raise ValueError(
            f"routed_experts: rows {found[:4]}; expected integer ids [S, L, K] of at least one "
            "sequence, with L and K of one model"
        )
    low, high = min(int(row.min()) for row in rows), max(int(row.max()) for row in rows)
    if max(-low, high) > _LARGEST_ID:
        # The largest number of an unsigned type is what a -1 becomes in it.
        wrapped = {np.iinfo(row.dtype).max for row in rows if row.dtype.kind == "u"}
        hint = " (a -1 of an unsigned type)" if high in wrapped else ""
        raise ValueError(
            f"routed_experts: ids from {low} to {high}{hint}; expected at most {_LARGEST_ID}: were "
            "the bytes read as the type they were written in?"
        )
    longest = max(row.shape[0] for row in rows)
    out = torch.full((len(rows), longest, *rows[0].shape[1:]), NO_RECORD, dtype=torch.int16)
    for index, row in enumerate(rows):
        out[index, : row.shape[0]] = torch.from_numpy(row.astype(np.int16))
    return out


def from_vllm(generated: np.ndarray, prompt: np.ndarray | None = None) -> np.ndarray:
    """Routes `[S or S-1, L, K]` of one vLLM completion; 0.21 has those of its prompt apart."""
    # A response of one token has no row: its token is never fed.
    whole = [part for part in (prompt, generated) if part is not None and part.size]
    return np.concatenate(whole) if len(whole) > 1 else (whole or [generated])[0]


def fit_to_model(
    routed_experts: Tensor, model: nn.Module, *, num_tokens: int | None = None
) -> Tensor:
    """A foreign record as `replay_routing` takes it on `model`: `[B, S, L, K]`.

    Layers: a record of every decoder layer keeps those with a router. Positions: where there is
    one row less than tokens, a last row of -1 is added.

    Args:
        routed_experts: `[B, S or S-1, L or all decoder layers, K]`.
        num_tokens: S of the sequences; None leaves the positions as they are.

    Raises:
        ValueError: neither number of layers, or neither number of positions, is that of the model.
    """
    layers = [tap.decoder_layer for tap in find_routers(model)]
    given = routed_experts.shape[2]
    inner = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    total = inner.config.get_text_config().num_hidden_layers if inner is not None else len(layers)
    if given != len(layers):
        if given != total or len(set(layers)) != len(layers):
            raise ValueError(
                f"routed_experts: {given} layers, but the model has {len(layers)} MoE layers of "
                f"{total} decoder layers; pass a record of either"
                + (MTP if given in (len(layers) + 1, total + 1) else "")
            )
        routed_experts = routed_experts[:, :, layers]
    length = routed_experts.shape[1]
    if num_tokens is None or length == num_tokens:
        return routed_experts.contiguous()
    if length != num_tokens - 1:
        raise ValueError(
            f"routed_experts: {length} positions for {num_tokens} tokens; engines give one row a "
            "token, or one less because the last token is never fed"
        )
    last = torch.full_like(routed_experts[:, :1], NO_RECORD)
    return torch.cat([routed_experts, last], dim=1)


def record_for_model(rows: Sequence[np.ndarray], model: nn.Module) -> Tensor:
    """Routes of B sequences as a checked record for `model`; see `stack_rows`, `fit_to_model`."""
    record = fit_to_model(stack_rows(rows), model)
    taps = find_routers(model)
    check_routed_experts(
        record, num_layers=len(taps), num_experts=taps[0].num_experts, top_k=taps[0].top_k
    )
    return record
