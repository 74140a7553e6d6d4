"""Replay check: the formula of a router's gate weights, to hold its code against."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Formula:
    """Gate weights `w [..., K]` of experts `ids [..., K]` from raw router logits `[..., E]`.

        r = score(temper * logits) over all E;  w = r[ids];  w /= sum(w) if normalised;  w *= scale;
        w /= K if averaged

    A softmax over the K chosen logits alone (GPT-OSS, Granite) is a normalised softmax.
    """

    score: str
    """softmax, sigmoid or sqrt_softplus."""
    normalise: bool | str = False
    """Whether the K weights are divided by their sum; a string names the config's switch."""
    scale: float | str = 1.0
    """Factor at the end; a string names the config's field."""
    averaged: bool = False
    """Whether the K weights are divided by K."""
    temper: float | str = 1.0
    """Factor of the logits; a string names the config's field."""

    def weights(self, logits: Tensor, ids: Tensor, config: Any) -> Tensor:
        """The formula in the type of `logits`, differentiable."""
        scores = {
            "softmax": lambda x: x.softmax(dim=-1),
            "sigmoid": torch.sigmoid,
            "sqrt_softplus": lambda x: nn.functional.softplus(x).sqrt(),
        }[self.score](logits * _number(self.temper, config))
        weights = scores.gather(-1, ids)
        if _number(self.normalise, config):
            weights = weights / weights.sum(dim=-1, keepdim=True)
        weights = weights * _number(self.scale, config)
        return weights / ids.shape[-1] if self.averaged else weights


def _number(value: float | str, config: Any) -> float:
    return float(getattr(config, value) if isinstance(value, str) else value)
