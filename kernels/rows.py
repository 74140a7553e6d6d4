"""What both fused backends do per token, outside of the loop over the vocabulary.

N tokens; every array here is `[N]`, so float64 costs nothing and no rounding is added.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_rl.kernels.arguments import Head

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""To logprobs, entropy and lse, each `[N]`; None: the loss does not use it."""


def exact_target_scores(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, head: Head
) -> Tensor:
    """s[target] of each token, float64 `[N]`: N products of length H, from the exact inputs.

    The loops below put it in the place of the score that their matrix product gives. Its error is
    then out of the log-probability, and since the same number stands in s[target] and in the
    logsumexp, no log-probability is above 0.
    """
    scores = hidden.new_empty(targets.shape, dtype=torch.float64)
    step = max(1, 2**21 // hidden.shape[1])  # 16 MiB of float64
    for start in range(0, len(targets), step):
        rows = slice(start, start + step)
        scores[rows] = (hidden[rows].double() * weight[targets[rows]].double()).sum(-1)
    if bias is not None:
        scores += bias[targets].double()
    if head.softcap is not None:
        scores = head.softcap * torch.tanh(scores / head.softcap)
    return scores / head.temperature


@dataclass(frozen=True, kw_only=True)
class Slopes:
    """d loss / d s, up to the factor 1 / temperature that is in all three already.

    For a word that is not the target it is p * (base - spread * log p); for the target, `target`.
    """

    base: Tensor
    spread: Tensor | None
    target: Tensor


def slopes(
    grads: Gradients, logprobs: Tensor, entropy: Tensor, head: Head, dtype: torch.dtype
) -> Slopes:
    """Coefficients of the gradient to the scores, each `[N]` of `dtype`.

        d logprob / d s_v = [v = target] - p_v
        d lse     / d s_v = p_v
        d entropy / d s_v = -p_v (log p_v + entropy)

    For the target 1 - p is -expm1(log p): the difference of a rounded p loses all digits at p = 1.
    """
    log_p = logprobs.double()
    to_logprobs, to_entropy, to_lse = (
        torch.zeros_like(log_p) if grad is None else grad.double() for grad in grads
    )
    base, pull = to_lse - to_logprobs, to_lse
    if grads[1] is not None:
        base, pull = base - to_entropy * entropy, pull - to_entropy * (log_p + entropy)
    target = -to_logprobs * torch.expm1(log_p) + log_p.exp() * pull
    return Slopes(
        base=(base / head.temperature).to(dtype),
        spread=None if grads[1] is None else (to_entropy / head.temperature).to(dtype),
        target=(target / head.temperature).to(dtype),
    )
