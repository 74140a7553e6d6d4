"""What both fused backends do per token, outside of the loop over the vocabulary.

N tokens; every array here is `[N]`, so float64 costs nothing and no rounding is added.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_rl.kernels.arguments import ZERO_LOG_P, HeadInputs

SLAB_NUMBERS = 2**21
"""Hidden numbers that are widened at a time: 16 MiB of float64."""

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""To logprobs, entropy and lse, each `[N]`; None: the loss does not use it."""


def exact_target_scores(inputs: HeadInputs) -> Tensor:
    """s[target] of each token, float64 `[N]`: N products of length H, from the exact inputs.

    In the place of what the matrix product gives for the target: its error, often the largest part
    of a log-probability's, is then 0.
    """
    hidden, weight, targets, softcap = inputs.hidden, inputs.weight, inputs.targets, inputs.softcap
    scores = hidden.new_empty(targets.shape, dtype=torch.float64)
    step = max(1, SLAB_NUMBERS // hidden.shape[1])
    for start in range(0, len(targets), step):
        rows = slice(start, start + step)
        scores[rows] = (hidden[rows].double() * weight[targets[rows]].double()).sum(-1)
    if inputs.bias is not None:
        scores += inputs.bias[targets].double()
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores / inputs.temperature


def outputs_of(
    exact: Tensor, peak: Tensor, total: Tensor, moment: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`(logprobs, entropy, lse)` float64 `[N]` from the target's score and the other words' sums.

        others = m + log l
        logprob = -log(1 + exp(others - exact))
        entropy = log l' - u' / l', with l' and u' the sums over all words

    Never above 0, and exact to the last digit of 1 - p: in l' = 1 + l a small l would be lost.

    Args:
        exact: score of the target.
        peak: m, a number that no score of another word exceeds.
        total: l = sum over the other words of exp(s - m).
        moment: u = sum over the other words of exp(s - m) (s - m); None: no entropy.
    """
    others = peak + total.log()
    # Not softplus, which takes x for log(1 + exp x) from 20 on.
    logprobs = -torch.logaddexp(torch.zeros_like(exact), others - exact)
    lse = torch.logaddexp(others, exact)
    if moment is None:
        return logprobs, None, lse
    _, total_all, moment_all = merged(
        (peak, total, moment), (exact, torch.ones_like(exact), torch.zeros_like(exact))
    )
    assert moment_all is not None
    return logprobs, total_all.log() - moment_all / total_all, lse


Sums = tuple[Tensor, Tensor, Tensor | None]
"""m, l and u of some words, float64 `[N]`; u is None where no entropy is asked for."""


def merged(a: Sums, b: Sums) -> Sums:
    """The sums over the words of both."""
    peak = torch.maximum(a[0], b[0])
    # Bounded below: of removed words the exponential, 0, times the distance, -inf, would be NaN.
    down_a, down_b = ((part[0] - peak).clamp_min(ZERO_LOG_P) for part in (a, b))
    scale_a, scale_b = down_a.exp(), down_b.exp()
    total = scale_a * a[1] + scale_b * b[1]
    if a[2] is None or b[2] is None:
        return peak, total, None
    moment = scale_a * (a[2] + a[1] * down_a) + scale_b * (b[2] + b[1] * down_b)
    return peak, total, moment


@dataclass(frozen=True, kw_only=True)
class Slopes:
    """d loss / d s / temperature, each `[N]` in the dtype of the scores.

    For a word that is not the target it is p * (base - spread * log p) with log p = s - lse; for
    the target it is `target`.
    """

    lse: Tensor
    base: Tensor
    spread: Tensor | None
    target: Tensor

    def where(self, keep: Tensor) -> "Slopes":
        """A copy without gradients of ignored tokens: lse = inf makes p = exp(s - lse) 0."""
        return Slopes(
            lse=self.lse.where(keep, torch.inf),
            base=self.base.where(keep, 0),
            spread=None if self.spread is None else self.spread.where(keep, 0),
            target=self.target.where(keep, 0),
        )


def slopes(
    grads: Gradients,
    outputs: tuple[Tensor, Tensor, Tensor],
    temperature: float | Tensor,
    dtype: torch.dtype,
) -> Slopes:
    """Coefficients of the gradient to the scores, from logprobs, entropy and lse (float64).

        d logprob / d s_v = [v = target] - p_v
        d lse     / d s_v = p_v
        d entropy / d s_v = -p_v (log p_v + entropy)

    For the target 1 - p is -expm1(log p): the difference of a rounded p loses all digits at p = 1.
    An lse of 1e4 has steps of 1e-3 in float32; what its rounding leaves, r = lse - rounded, goes
    into the coefficients: p = exp(s - rounded) exp(-r).
    """
    log_p, entropy, lse = (out.double() for out in outputs)
    to_logprobs, to_entropy, to_lse = (
        torch.zeros_like(log_p) if grad is None else grad.double() for grad in grads
    )
    base, pull = to_lse - to_logprobs, to_lse
    if grads[1] is not None:
        base = base - to_entropy * entropy
        # A removed target's 0 * -inf would be NaN.
        pull = pull - to_entropy * (log_p.clamp_min(ZERO_LOG_P) + entropy)
    target = -to_logprobs * torch.expm1(log_p) + log_p.exp() * pull
    rest = lse - lse.to(dtype).double()
    base, spread = (-rest).exp() * (base + to_entropy * rest), (-rest).exp() * to_entropy
    return Slopes(
        lse=lse.to(dtype),
        base=(base / temperature).to(dtype),
        spread=None if grads[1] is None else (spread / temperature).to(dtype),
        target=(target / temperature).to(dtype),
    )
