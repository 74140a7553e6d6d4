"""A recorded trace as a rollout that the audited model can read."""

import torch
from torch import Tensor

from moe_rl.batch import RolloutBatch
from moe_rl.config import ConfigError
from moe_rl.policy.policy import Policy
from moe_rl.routing import find_routers
from moe_rl.traces import fit_to_model
from moe_rl.traces.files import Trace


def batch_of_trace(policy: Policy, name: str, trace: Trace) -> tuple[RolloutBatch, Tensor]:
    """The tokens of a trace as a rollout whose first token is its prompt, and those to compare.

    The mask is bool [B, T]: response tokens that are predicted where there is a record.
    """
    if trace.tokens is None:
        raise ConfigError(
            f"trace={name!r}: holds no token ids, so the model cannot read the same tokens; record "
            "prompt_token_ids and token_ids beside the routes"
        )
    try:
        record = fit_to_model(trace.routed_experts, policy.model)
    except ValueError as error:
        raise ConfigError(f"trace={name!r}: {error}; give a trace of this model") from error
    taps = find_routers(policy.model)
    if record.shape[3] != taps[0].top_k:
        raise ConfigError(
            f"trace={name!r}: routes of {record.shape[3]} experts a token, the model's routers "
            f"choose {taps[0].top_k}; give a trace of this model"
        )
    words = policy.model.get_input_embeddings().num_embeddings
    holes = (trace.tokens[:, :-1] < 0) & (trace.tokens[:, 1:] >= 0)
    if bool(holes.any()) or int(trace.tokens.min()) < -1:
        raise ConfigError(
            f"trace={name!r}: a negative token id in a sequence; record the tokens as they were fed"
        )
    if int(trace.tokens.max()) >= words:
        raise ConfigError(
            f"trace={name!r}: token id {int(trace.tokens.max())}, the model embeds {words}; give a "
            "trace of this model"
        )
    if int(record.max()) >= taps[0].num_experts:
        raise ConfigError(
            f"trace={name!r}: expert id {int(record.max())}, the model has "
            f"{taps[0].num_experts} experts; give a trace of this model"
        )
    context = policy.context
    if context is not None and trace.tokens.shape[1] > context:
        raise ConfigError(
            f"trace={name!r}: sequences of {trace.tokens.shape[1]} tokens, the model's context is "
            f"{context}; give a trace of this model"
        )
    routes, tokens = record.to(policy.device), trace.tokens.to(policy.device)
    kept = tokens >= 0
    ids = tokens.masked_fill(~kept, policy.pad_id)
    mask = kept[:, 1:] & (routes[:, :-1] >= 0).flatten(2).all(-1)
    if trace.response is not None:
        mask &= trace.response[:, :-1].to(policy.device)
    if not mask.any():
        raise ConfigError(f"trace={name!r}: no response token has a record; give another trace")
    batch = RolloutBatch(
        prompt_ids=ids[:, :1],
        prompt_mask=kept[:, :1],
        response_ids=ids[:, 1:],
        response_mask=kept[:, 1:],
        rollout_logprobs=(
            torch.zeros(ids[:, 1:].shape) if trace.logprobs is None else trace.logprobs[:, :-1]
        ).to(policy.device),
        routed_experts=routes,
        router_logits=None,
        truncated=torch.zeros(len(ids), dtype=torch.bool, device=ids.device),
    )
    return batch, mask
