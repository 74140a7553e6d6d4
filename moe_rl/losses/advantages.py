"""Group-relative advantages: a response is compared with the others to the same prompt."""

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
