"""The default rollout engine: the policy itself, decoding with a key-value cache.

Prompts are read once per group. Sampling is by inverse distribution function from given uniforms,
so a rollout is a pure function of (weights, prompts, uniforms, noise).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_rl.batch import RolloutBatch, full_record, predictions
from moe_rl.policy.forward import ForwardOptions, routing_contexts
from moe_rl.policy.policy import Policy
from moe_rl.policy.router_noise import RouterNoise
from moe_rl.rollout.request import Request
from moe_rl.runtime.seeding import uniforms
from moe_rl.tasks.base import Prompt


@dataclass(frozen=True)
class CachedEngine:
    """The policy itself. Its tokens are a pure function of the weights and the request."""

    policy: Policy

    def sample(self, request: Request) -> RolloutBatch:
        """See `Engine`."""
        draws = uniforms(
            request.seed,
            request.purpose,
            step=request.step,
            prompts=request.numbers,
            group_size=request.group_size,
            count=request.max_tokens,
        )
        return generate(
            self.policy,
            request.prompts,
            torch.from_numpy(draws),
            noise=request.noise,
            router_logits=request.router_logits,
            gate_weights=request.gate_weights,
        )


@torch.no_grad()
def generate(
    policy: Policy,
    prompts: Sequence[Prompt],
    draws: Tensor,
    *,
    noise: RouterNoise | None = None,
    router_logits: bool = False,
    gate_weights: bool = False,
) -> RolloutBatch:
    """Sample G responses of at most T_max tokens to each of P prompts at the policy's temperature.

    `draws` are uniforms, float64 [P * G, T_max] in [0, 1): one number decides one token.
    """
    prompt_ids, prompt_mask = policy.encode_prompts(prompts)
    sequences, budget = draws.shape
    group = sequences // len(prompts)
    draws = draws.to(policy.device)
    options = ForwardOptions(router_logits=router_logits, record_weights=gate_weights)
    tokens, logprobs, masks = list[Tensor](), list[Tensor](), list[Tensor]()
    ends = torch.tensor(policy.end_ids, device=policy.device)
    finished = torch.zeros(sequences, dtype=torch.bool, device=policy.device)
    of_prompts = noise.for_prompts() if noise else None
    of_responses = noise.for_responses() if noise else None
    with routing_contexts(policy.model, options, noise=of_prompts) as seen_prompts:
        hidden, cache = policy.read_prompts(prompt_ids, prompt_mask)
    cache.batch_repeat_interleave(group)
    hidden = hidden[:, -1].repeat_interleave(group, dim=0)
    with routing_contexts(policy.model, options, noise=of_responses) as seen:
        for step in range(budget):
            token, logprob = sample_tokens(policy.logits(hidden), draws[:, step])
            masks.append(~finished)
            tokens.append(token.masked_fill(finished, policy.pad_id))
            logprobs.append(logprob)
            finished = finished | torch.isin(token, ends)
            if step + 1 == budget or bool(finished.all()):
                break
            read = policy.continue_responses(tokens[-1][:, None], cache, prompt_mask, group)
            hidden = read[:, -1]
    # Where all responses end at once no token was read after the prompts: `seen` is empty.
    seen = seen if len(tokens) > 1 else None
    routes = full_record(seen_prompts.routed_experts, seen and seen.routed_experts, group)
    logits = weights = None
    if router_logits:
        logits = predictions(seen_prompts.router_logits, seen and seen.router_logits, group)
    if gate_weights:
        responses = seen and seen.gate_weights
        weights = full_record(seen_prompts.gate_weights, responses, group, fill=torch.nan)
    return RolloutBatch(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        response_ids=torch.stack(tokens, dim=1),
        response_mask=torch.stack(masks, dim=1),
        rollout_logprobs=torch.stack(logprobs, dim=1),
        routed_experts=routes,
        router_logits=logits,
        gate_weights=weights,
        truncated=~finished,
    )


def sample_tokens(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """One token a row by inverse distribution function: ids int64 [B], log-probs float32 [B].

    The running sum is taken in float64: in float32, rounding would leave the last of 1e5 tokens
    unreachable by any uniform.

    Raises:
        FloatingPointError: a row of the logits has NaN or inf.
    """
    log_p = torch.log_softmax(logits, dim=-1)
    cumulative = log_p.double().exp().cumsum(dim=-1)
    total = cumulative[:, -1:]
    if not bool(total.isfinite().all()):
        raise FloatingPointError("NaN or inf in the policy's logits: nothing can be sampled")
    # The product may round up to the total, which only impossible tokens at the end would follow.
    threshold = (uniforms[:, None] * total).minimum(total.nextafter(torch.zeros_like(total)))
    token = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    return token, log_p.gather(-1, token[:, None]).squeeze(-1)
