"""The losses of the papers once more, independent of `moe_rl.losses`: plain loops over float64.

A formula sees the tokens of one response and returns the loss of each. Where a paper stops a
gradient it reads `held`, which has the values of `new` and stays as it is while `new` is varied.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Options = Mapping[str, float]


class Response(NamedTuple):
    """Log-probs, advantages, router shift and values of a response's tokens."""

    new: list[float]
    held: list[float]
    old: list[float]
    rollout: list[float]
    advantages: list[float]
    shift: list[float]
    values: list[float]
    old_values: list[float]
    returns: list[float]

    @property
    def ratios(self) -> list[float]:
        return [math.exp(new - old) for new, old in zip(self.new, self.old, strict=True)]

    @property
    def held_ratios(self) -> list[float]:
        return [math.exp(held - old) for held, old in zip(self.held, self.old, strict=True)]

    @property
    def corrections(self) -> list[float]:
        return [math.exp(old - mu) for old, mu in zip(self.old, self.rollout, strict=True)]


Formula = Callable[[Response, Options], list[float]]


def geometric_mean(values: list[float]) -> float:
    return math.prod(values) ** (1 / len(values))


def clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def surrogate(ratio: float, a: float, o: Options) -> float:
    return min(ratio * a, clip(ratio, 1 - o["clip_low"], 1 + o["clip_high"]) * a)


def grpo(y: Response, o: Options) -> list[float]:
    return [-surrogate(w, a, o) for w, a in zip(y.ratios, y.advantages, strict=True)]


def dual_clip(y: Response, o: Options) -> list[float]:
    losses = []
    for w, a in zip(y.ratios, y.advantages, strict=True):
        value = surrogate(w, a, o)
        losses.append(-max(value, o["bound"] * a) if a < 0 else -value)
    return losses


def ppo(y: Response, o: Options) -> list[float]:
    losses = []
    for policy, value, old, target in zip(
        grpo(y, o), y.values, y.old_values, y.returns, strict=True
    ):
        near = clip(value, old - o["value_clip"], old + o["value_clip"])
        miss = max((value - target) ** 2, (near - target) ** 2) / 2
        losses.append(policy + o["value_coef"] * miss)
    return losses


def cispo(y: Response, o: Options) -> list[float]:
    terms = zip(y.held_ratios, y.advantages, y.new, strict=True)
    return [-min(w, o["bound"]) * a * new for w, a, new in terms]


def dppo_tv(y: Response, o: Options) -> list[float]:
    losses = []
    for new, held, old, a in zip(y.new, y.held, y.old, y.advantages, strict=True):
        moved = math.exp(held) - math.exp(old)
        valid = moved <= o["distance"] if a > 0 else moved >= -o["distance"]
        losses.append(-min(math.exp(held - old), o["bound"]) * a * new if valid else 0.0)
    return losses


def tis(y: Response, o: Options) -> list[float]:
    return [min(rho, o["bound"]) * x for rho, x in zip(y.corrections, grpo(y, o), strict=True)]


def mis(y: Response, o: Options) -> list[float]:
    rho = math.prod(y.corrections)
    return [(rho if rho <= o["bound"] else 0.0) * x for x in grpo(y, o)]


def geo_rs(y: Response, o: Options) -> list[float]:
    keep = o["lowest"] <= geometric_mean(y.corrections) <= o["highest"]
    return [x if keep else 0.0 for x in grpo(y, o)]


def icepop(y: Response, o: Options) -> list[float]:
    terms = zip(y.corrections, grpo(y, o), strict=True)
    return [(rho if o["lowest"] <= rho <= o["highest"] else 0.0) * x for rho, x in terms]


def clipped_geometric_mean(ratios: list[float], y: Response, o: Options) -> list[float]:
    low, high = math.exp(-o["log_clip"]), math.exp(o["log_clip"])
    picked = []
    for ratio, a in zip(ratios, y.advantages, strict=True):
        picked.append(min(ratio, clip(ratio, low, high), key=lambda choice, a=a: choice * a))
    return [-geometric_mean(picked) * a for a in y.advantages]


def gmpo(y: Response, o: Options) -> list[float]:
    return clipped_geometric_mean(y.ratios, y, o)


def rspo(y: Response, o: Options) -> list[float]:
    scaled = [w * max(gamma, o["lowest"]) for w, gamma in zip(y.ratios, y.shift, strict=True)]
    return clipped_geometric_mean(scaled, y, o)


def sapo(y: Response, o: Options) -> list[float]:
    losses = []
    for w, a in zip(y.ratios, y.advantages, strict=True):
        tau = o["tau_positive"] if a > 0 else o["tau_negative"]
        losses.append(-4 / tau / (1 + math.exp(-tau * (w - 1))) * a)
    return losses


def gspo(y: Response, o: Options) -> list[float]:
    """The ratio as a root of a ratio of likelihoods."""
    likelihood = math.prod(math.exp(new) for new in y.new)
    old_likelihood = math.prod(math.exp(old) for old in y.old)
    ratio = (likelihood / old_likelihood) ** (1 / len(y.new))
    return [-surrogate(ratio, a, o) for a in y.advantages]


def gspo_token(y: Response, o: Options) -> list[float]:
    sequence = geometric_mean(y.held_ratios)
    terms = zip(y.new, y.held, y.advantages, strict=True)
    return [-surrogate(sequence * math.exp(new) / math.exp(held), a, o) for new, held, a in terms]


def policy_gradient(y: Response, o: Options) -> list[float]:
    return [-a * new for a, new in zip(y.advantages, y.new, strict=True)]


def positive_only(y: Response, o: Options) -> list[float]:
    terms = zip(y.ratios, y.advantages, strict=True)
    return [-min(w, 1 + o["clip_high"]) * a if a > 0 else 0.0 for w, a in terms]


FORMULAS: dict[str, Formula] = {
    "grpo": grpo,
    "dual_clip": dual_clip,
    "dr_grpo": grpo,
    "dapo": grpo,
    "ppo": ppo,
    "cispo": cispo,
    "tis": tis,
    "mis": mis,
    "geo_rs": geo_rs,
    "icepop": icepop,
    "dppo_tv": dppo_tv,
    "gmpo": gmpo,
    "sapo": sapo,
    "rspo": rspo,
    "gspo": gspo,
    "gspo_token": gspo_token,
    "policy_gradient": policy_gradient,
    "positive_only": positive_only,
}


def total(losses: list[list[float]], how: str, budget: int) -> float:
    """The scalar loss of responses, of which some may be empty; `budget` is the longest allowed."""
    sums = [sum(response) for response in losses]
    lengths = [len(response) for response in losses]
    if how == "token_mean":
        return sum(sums) / max(1, sum(lengths))
    if how == "fixed_length":
        return sum(sums) / (len(losses) * budget)
    means = [total / length for total, length in zip(sums, lengths, strict=True) if length]
    return sum(means) / len(losses)


def numerical_gradient(function: Callable[[Array], float], at: Array, step: float = 1e-6) -> Array:
    gradient = np.zeros_like(at)
    for index in np.ndindex(*at.shape):
        shift = np.zeros_like(at)
        shift[index] = step
        gradient[index] = (function(at + shift) - function(at - shift)) / (2 * step)
    return gradient
