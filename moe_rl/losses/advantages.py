"""Advantages: a response against the others to its prompt, or a token against a learned value."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, *, scale: bool = True) -> Tensor:
    """A_pg = (r_pg - mean_g r_pg) / std_g r_pg; GSPO paper (arXiv 2507.18071) eq. 3.

    The paper leaves the kind of standard deviation open; this is the unbiased one (divisor G - 1),
    as in TRL's GRPOTrainer. The population's would scale every advantage by sqrt(G / (G - 1)).
    No epsilon is added to it, so that advantages do not depend on the unit of the reward: a group
    of equal rewards has nothing to compare and is exactly 0.

    Args:
        rewards: [P, G], P prompts by G samples, finite, any real dtype.
        scale: divide by the standard deviation; False as in Dr. GRPO (arXiv 2503.20783).

    Returns:
        [P, G] float32 (float64 for float64 rewards); each row has mean 0 and, scaled, unbiased std
        1, or is all 0.

    Raises:
        ValueError: rewards not [P, G], G below 2, or a reward that is NaN or inf.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(
            f"rewards.shape={list(rewards.shape)}: expected [P, G], prompts by at least 2 samples; "
            "reshape with rewards.view(-1, group_size)"
        )
    exact = rewards.detach().to(torch.float64)
    bad = (~exact.isfinite()).nonzero()
    if len(bad):
        prompt, sample = bad[0].tolist()
        raise ValueError(
            f"rewards[{prompt}, {sample}]={exact[prompt, sample].item()}: NaN or inf at prompt "
            f"{prompt}, sample {sample} ({len(bad)} in all); fix the reward function"
        )
    dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    if not scale:
        return (exact - exact.mean(dim=1, keepdim=True)).to(dtype)
    # An advantage is the same for any shift and scale of the rewards, so they are first brought to
    # [0, 1]: squares of very small or very large rewards would under- or overflow. Halved, because
    # the range of the largest rewards overflows itself.
    halves = exact / 2
    low, high = halves.amin(dim=1, keepdim=True), halves.amax(dim=1, keepdim=True)
    unit = (halves - low) / (high - low)
    advantages = (unit - unit.mean(dim=1, keepdim=True)) / unit.std(dim=1, keepdim=True)
    return advantages.masked_fill(low == high, 0.0).to(dtype)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, lam: float) -> Tensor:
    """Generalised advantage estimation, undiscounted, of responses that are rewarded at their end.

        A_t = delta_t + lam A_(t+1),   delta_t = r_t + V_(t+1) - V_t

    with r_t the reward at the last token and 0 before it, V and A 0 behind it. lam=1 gives the
    reward minus V_t; below 1 a reward counts less by a factor lam for each token before the last,
    one of the two causes of PPO's collapse on long responses in VC-PPO (arXiv 2503.01491). A + V is
    what values are then trained on. Source: arXiv 1506.02438, eq. 16; no discount (gamma 1), as in
    arXiv 1909.08593, TRL and verl.

    Args:
        rewards: [B], of whole responses.
        values: [B, T], V_t is said before token t is sampled.
        mask: bool [B, T], response tokens, those of a response in one piece from its first on.
        lam: 0 to 1.

    Returns:
        [B, T], 0 in padding, not whitened.
    """
    values = values.detach().masked_fill(~mask, 0.0)
    advantages = torch.zeros_like(values)
    following = values.new_zeros(len(values))  # A_(t+1)
    next_value = rewards.to(values)  # the reward stands where the last token looks for V_(t+1)
    for t in reversed(range(values.shape[1])):
        here = mask[:, t]
        delta = next_value - values[:, t]
        following = torch.where(here, delta + lam * following, 0.0)
        next_value = torch.where(here, values[:, t], next_value)
        advantages[:, t] = following
    return advantages


def whiten(values: Tensor, mask: Tensor, *, total: Callable[[float], float] = float) -> Tensor:
    """Shift and scale to mean 0 and unbiased variance 1 over the tokens of the mask.

    1e-8 is added to the variance, as in TRL and in verl.

    Args:
        values: [B, T].
        mask: bool [B, T].
        total: sums a number over the processes that hold a part of the batch each.

    Returns:
        [B, T], 0 in padding.
    """
    kept = values[mask].double()
    count = total(float(len(kept)))
    mean = total(kept.sum().item()) / count
    variance = total((kept - mean).square().sum().item()) / max(1.0, count - 1)
    whitened = (values - mean) / math.sqrt(variance + 1e-8)
    return whitened.masked_fill(~mask, 0.0)
