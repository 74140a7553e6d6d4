"""The default rollout engine: the policy itself, decoding with a key-value cache where it has one.

Sampling is by inverse distribution function from given uniforms,
so a rollout is a pure function of (weights, prompts, uniforms, noise).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_rl.batch import RolloutBatch, full_record, predictions
from moe_rl.policy.forward import ForwardOptions
from moe_rl.policy.pass_noise import PassNoise
from moe_rl.policy.policy import Policy
from moe_rl.rollout.readers import read_whole, read_with_cache
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
    noise: PassNoise | None = None,
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
    read = read_whole if policy.reads_whole else read_with_cache
    disturb = noise.hidden_adder() if noise else lambda hidden: hidden
    with read(policy, prompt_ids, prompt_mask, group, options, noise) as reading:
        hidden = reading.hidden
        for step in range(budget):
            token, logprob = sample_tokens(policy.logits(disturb(hidden)), draws[:, step])
            masks.append(~finished)
            tokens.append(token.masked_fill(finished, policy.pad_id))
            logprobs.append(logprob)
            finished = finished | torch.isin(token, ends)
            if step + 1 == budget or bool(finished.all()):
                break
            hidden = reading.next(tokens[-1])
    routes = full_record(*reading.recorded("routed_experts"), group)
    logits = weights = None
    if router_logits:
        logits = predictions(*reading.recorded("router_logits"), group)
    if gate_weights:
        weights = full_record(*reading.recorded("gate_weights"), group, fill=torch.nan)
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
