"""The default rollout engine: the policy itself, decoding with a key-value cache.

Prompts are read once per group. Sampling is by inverse distribution function from given uniforms,
so a rollout is a pure function of (weights, prompts, uniforms, noise).
"""

import torch
from torch import Tensor

from moe_rl.batch import RolloutBatch, full_record, predictions
from moe_rl.policy.forward import Pass, routing
from moe_rl.policy.policy import Policy
from moe_rl.rollout.router_noise import RouterNoise


@torch.no_grad()
def generate(
    policy: Policy,
    prompts: list[str],
    uniforms: Tensor,
    *,
    noise: RouterNoise | None = None,
    scores: bool = False,
) -> RolloutBatch:
    """Sample G responses to each prompt at the policy's temperature.

    Args:
        policy: the model to sample from.
        prompts: P texts.
        uniforms: float64 [P * G, T_max] in [0, 1): one number decides one token.
        noise: router noise of this pass.
        scores: bring back router logits as well.

    Returns:
        The rollout; T is the longest response, at most T_max.
    """
    prompt_ids, prompt_mask = policy.encode_prompts(prompts)
    sequences, budget = uniforms.shape
    group = sequences // len(prompts)
    uniforms = uniforms.to(policy.device)
    options = Pass(scores=scores)
    tokens: list[Tensor] = []
    logprobs: list[Tensor] = []
    masks: list[Tensor] = []
    finished = torch.zeros(sequences, dtype=torch.bool, device=policy.device)
    with routing(
        policy.model, options, None, noise.for_prompts() if noise else None
    ) as seen_prompts:
        hidden, cache = policy.read_prompts(prompt_ids, prompt_mask)
    cache.batch_repeat_interleave(group)
    hidden = hidden[:, -1].repeat_interleave(group, dim=0)
    with routing(policy.model, options, None, noise.for_responses() if noise else None) as seen:
        for step in range(budget):
            token, logprob = sample(policy.logits(hidden), uniforms[:, step])
            masks.append(~finished)
            tokens.append(token.masked_fill(finished, policy.pad_id))
            logprobs.append(logprob)
            finished = finished | (token == policy.eos_id)
            if step + 1 == budget or bool(finished.all()):
                break
            hidden = policy.read_on(tokens[-1][:, None], cache, prompt_mask, group)[:, -1]
    read_on = len(tokens) > 1
    routes = full_record(
        seen_prompts.routed_experts, seen.routed_experts if read_on else None, group
    )
    router_logits = None
    if scores:
        router_logits = predictions(
            seen_prompts.router_logits, seen.router_logits if read_on else None, group
        )
    return RolloutBatch(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        response_ids=torch.stack(tokens, dim=1),
        response_mask=torch.stack(masks, dim=1),
        rollout_logprobs=torch.stack(logprobs, dim=1),
        routed_experts=routes,
        router_logits=router_logits,
        truncated=~finished,
    )


def sample(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """One token a row by inverse distribution function: ids int64 [B], log-probs float32 [B].

    The running sum is taken in float64, so that a vocabulary of 1e5 tokens leaves no tail that no
    uniform can reach.

    Raises:
        FloatingPointError: the logits of a row are not finite.
    """
    log_p = torch.log_softmax(logits, dim=-1)
    cumulative = log_p.double().exp().cumsum(dim=-1)
    total = cumulative[:, -1:]
    if not bool(total.isfinite().all()):
        raise FloatingPointError("the policy's logits are not finite, so nothing can be sampled")
    # The product may round up to the total, which only impossible tokens at the end would follow.
    threshold = (uniforms[:, None] * total).minimum(total.nextafter(torch.zeros_like(total)))
    token = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    return token, log_p.gather(-1, token[:, None]).squeeze(-1)
