"""Losses: one algorithm per file, each a pure function of tensors; this file finds them by name.

inputs = make_inputs(logprobs, old_logprobs, advantages, mask)
aggregate(gspo_loss(inputs), inputs, "sequence_mean").backward()
"""

import inspect
import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

from moe_rl.losses.base import (
    Aggregation,
    LossFunction,
    LossInputs,
    aggregate,
    check_clip_bounds,
    make_inputs,
)
from moe_rl.losses.cispo import cispo_loss
from moe_rl.losses.dapo import dapo_loss
from moe_rl.losses.dppo_tv import dppo_tv_loss
from moe_rl.losses.dual_clip import dual_clip_loss
from moe_rl.losses.geo_rs import geo_rs_loss
from moe_rl.losses.gmpo import gmpo_loss
from moe_rl.losses.grpo import grpo_loss
from moe_rl.losses.gspo import gspo_loss
from moe_rl.losses.gspo_token import gspo_token_loss
from moe_rl.losses.icepop import icepop_loss
from moe_rl.losses.mis import mis_loss
from moe_rl.losses.policy_gradient import policy_gradient_loss
from moe_rl.losses.positive_only import positive_only_loss
from moe_rl.losses.ppo import ppo_loss
from moe_rl.losses.rspo import rspo_loss
from moe_rl.losses.sapo import sapo_loss
from moe_rl.losses.tis import tis_loss

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "LossFunction",
    "LossInputs",
    "aggregate",
    "find_algorithm",
    "make_inputs",
    "resolve_options",
]

# A token ratio moves by tens of percent, the geometric mean of a response's ratios by far less, so
# that the clip ranges of the two do not overlap: GSPO's 4e-4 and GRPO's 0.2 (GSPO paper,
# arXiv 2507.18071, 5.1) lie a factor of 500 apart. This is their geometric mean, 9e-3, rounded.
SCALE_BOUNDARY = 1e-2


class Algorithm(NamedTuple):
    """A loss and what goes with it."""

    loss: LossFunction
    ratio: Literal["token", "sequence"] = "token"
    """What its clip range, if it has one, is a range of."""
    aggregation: Aggregation = "sequence_mean"
    scale_advantages: bool = True
    """Divide group advantages by their standard deviation."""
    reads_routers: bool = False
    """Whether the loss reads `LossInputs.router_shift`."""
    weighs_engine: bool = False
    """Whether all that it adds to GRPO is read from the ratio of old to rollout log-probs."""
    sha256: str | None = None
    """Of the file of a user's own loss."""
    learns_value: bool = False
    """Train a value head, whose values give each token an advantage of its own, in place of the
    group's."""

    @property
    def options(self) -> dict[str, float]:
        """Names and defaults of the loss's options."""
        parameters = inspect.signature(self.loss).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


ALGORITHMS: dict[str, Algorithm] = {
    "grpo": Algorithm(grpo_loss),
    "dual_clip": Algorithm(dual_clip_loss),
    "dr_grpo": Algorithm(grpo_loss, aggregation="fixed_length", scale_advantages=False),
    "dapo": Algorithm(dapo_loss, aggregation="token_mean"),
    "ppo": Algorithm(ppo_loss, aggregation="token_mean", learns_value=True),
    "cispo": Algorithm(cispo_loss, aggregation="token_mean"),
    "tis": Algorithm(tis_loss, weighs_engine=True),
    "mis": Algorithm(mis_loss, weighs_engine=True),
    "geo_rs": Algorithm(geo_rs_loss, weighs_engine=True),
    "icepop": Algorithm(icepop_loss, weighs_engine=True),
    "dppo_tv": Algorithm(dppo_tv_loss, aggregation="fixed_length", scale_advantages=False),
    "gmpo": Algorithm(gmpo_loss),
    "sapo": Algorithm(sapo_loss),
    "rspo": Algorithm(rspo_loss, reads_routers=True),
    "gspo": Algorithm(gspo_loss, ratio="sequence"),
    "gspo_token": Algorithm(gspo_token_loss, ratio="sequence"),
    "policy_gradient": Algorithm(policy_gradient_loss),
    "positive_only": Algorithm(positive_only_loss),
}


def find_algorithm(name: str) -> Algorithm:
    """The algorithm of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in ALGORITHMS:
        raise ValueError(f"algorithm={name!r}: unknown; use one of {', '.join(ALGORITHMS)}")
    return ALGORITHMS[name]


def resolve_options(
    name: str,
    algorithm: Algorithm,
    given: Mapping[str, float | None],
    *,
    allow_any_scale: bool = False,
    or_else: str = "set allow_any_clip_scale (--allow-any-clip-scale)",
) -> dict[str, float]:
    """The options of a run: what was given, else the loss's defaults, which are the papers'.

    With the other kind's clip range a run would train without an error and mean little: GSPO at 0.2
    clips nothing, GRPO at 3e-4 nearly everything. So that is refused.

    Args:
        name: of the algorithm, for the messages.
        algorithm: whose options they are.
        given: values by name; None stands for the default.
        allow_any_scale: skip the comparison of clip scales (not that of bounds).
        or_else: what to do about a range of the other scale, for the message.

    Raises:
        ValueError: an option that the loss does not have or that is not above 0, bounds that leave
            nothing, or a clip range out of bounds or on the other side of SCALE_BOUNDARY.
    """
    chosen = {key: value for key, value in given.items() if value is not None}
    options = algorithm.options
    for key, value in chosen.items():
        if key not in options:
            has = ", ".join(options) or "none"
            raise ValueError(f"{key}={value:g}: no option of {name}, which has {has}; leave it out")
        own = algorithm.sha256 is not None  # what its options mean is the user's to say
        if not own and key not in ("clip_low", "clip_high") and not value > 0:
            raise ValueError(
                f"{key}={value:g}: not above 0; the default of {name} is {options[key]:g}"
            )
    options |= chosen
    lowest, highest = options.get("lowest", 0.0), options.get("highest", math.inf)
    if algorithm.sha256 is None and lowest >= highest:
        raise ValueError(
            f"lowest={lowest:g}: not below highest={highest:g}; {name} would drop every token"
        )
    if algorithm.loss is dual_clip_loss and options["bound"] <= 1:
        raise ValueError(
            f"bound={options['bound']:g}: not above 1, so that {name} would bound ratios that have "
            "not risen; the default is 3"
        )
    check_clip_bounds(options.get("clip_low", 0.0), options.get("clip_high", 0.0))
    for key in ("clip_low", "clip_high"):
        value = options.get(key, 0.0)
        scale = "token" if value >= SCALE_BOUNDARY else "sequence"
        if key in chosen and scale != algorithm.ratio and not allow_any_scale:
            raise ValueError(
                f"{key}={value:g}: on the scale of {scale} ratios, but {name} clips "
                f"{algorithm.ratio} ratios; use about 0.2 and 0.27 for token ratios (grpo), 3e-4 "
                f"and 4e-4 for sequence ratios (gspo, gspo_token), or {or_else}"
            )
    return options
