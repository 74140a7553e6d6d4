"""Losses: one algorithm per file, each a pure function of tensors; this file finds them by name.

loss_function("gspo")(logprobs, old_logprobs, advantages, mask).loss.backward()
"""

from typing import NamedTuple

from moe_rl.losses import grpo, gspo
from moe_rl.losses.base import LossFunction, LossOutput, check_clip_bounds
from moe_rl.losses.grpo import grpo_loss
from moe_rl.losses.gspo import gspo_loss
from moe_rl.losses.gspo_token import gspo_token_loss

__all__ = [
    "ALGORITHMS",
    "LossFunction",
    "LossOutput",
    "grpo_loss",
    "gspo_loss",
    "gspo_token_loss",
    "loss_function",
    "resolve_clip",
]

# A token ratio moves by tens of percent, the geometric mean of a response's ratios by far less, so
# that the clip ranges of the two do not overlap: GSPO's 4e-4 and GRPO's 0.2 (GSPO paper,
# arXiv 2507.18071, 5.1) lie a factor of 500 apart. This is their geometric mean, 9e-3, rounded.
SCALE_BOUNDARY = 1e-2


class _Algorithm(NamedTuple):
    loss: LossFunction
    clip_low: float
    clip_high: float
    ratio: str  # "token" or "sequence"


ALGORITHMS: dict[str, _Algorithm] = {
    "grpo": _Algorithm(grpo_loss, grpo.CLIP_LOW, grpo.CLIP_HIGH, "token"),
    "gspo": _Algorithm(gspo_loss, gspo.CLIP_LOW, gspo.CLIP_HIGH, "sequence"),
    "gspo_token": _Algorithm(gspo_token_loss, gspo.CLIP_LOW, gspo.CLIP_HIGH, "sequence"),
}


def _find_algorithm(algorithm: str) -> _Algorithm:
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm={algorithm!r}: unknown; use one of {', '.join(ALGORITHMS)}")
    return ALGORITHMS[algorithm]


def loss_function(algorithm: str) -> LossFunction:
    """The loss of `algorithm`: grpo, gspo or gspo_token.

    Raises:
        ValueError: for another name.
    """
    return _find_algorithm(algorithm).loss


def resolve_clip(
    algorithm: str,
    low: float | None = None,
    high: float | None = None,
    *,
    allow_any_scale: bool = False,
) -> tuple[float, float]:
    """(clip_low, clip_high) of a run: what was given, else the GSPO paper's (2507.18071, 5.1).

    With the other algorithm's range a run would train without an error and mean little: GSPO at 0.2
    clips nothing, GRPO at 3e-4 nearly everything. So that is refused.

    Args:
        algorithm: grpo, gspo or gspo_token.
        low, high: a ratio is clipped to [1 - low, 1 + high]; low from 0 to 1, high at least 0.
        allow_any_scale: skip the comparison of scales (not that of bounds).

    Raises:
        ValueError: for an unknown algorithm, a range outside the bounds, or a scale on the other
            side of SCALE_BOUNDARY.
    """
    found = _find_algorithm(algorithm)
    low = found.clip_low if low is None else low
    high = found.clip_high if high is None else high
    check_clip_bounds(low, high)
    for name, value in (("clip_low", low), ("clip_high", high)):
        scale = "token" if value >= SCALE_BOUNDARY else "sequence"
        if scale != found.ratio and not allow_any_scale:
            raise ValueError(
                f"{name}={value:g}: on the scale of {scale} ratios, but {algorithm} clips "
                f"{found.ratio} ratios; use about 0.2 and 0.27 for token ratios (grpo), 3e-4 and "
                "4e-4 for sequence ratios (gspo, gspo_token), or set allow_any_clip_scale "
                "(--allow-any-clip-scale)"
            )
    return low, high
