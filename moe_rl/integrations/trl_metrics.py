"""Integrations: the instruments of an update of TRL's GRPOTrainer, over all that it consists of.

An update is some micro-batches on some processes. Variances and quantiles of parts do not average
to those of the whole, so the parts are kept until the optimiser steps, gathered, and measured as
one batch: each process gets the same numbers. Definitions: docs/metrics.md.

Shapes: b sequences of a micro-batch, T response positions, L MoE layers, K experts a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_rl.metrics.ratios import ratio_statistics, split_log_ratio
from moe_rl.routing import statistics


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What one forward pass of an update leaves for its metrics; log-probs `[b, T]` in nats."""

    logprobs: Tensor
    """Of the forward in the loss."""
    old_logprobs: Tensor
    mask: Tensor
    """bool [b, T], response tokens."""
    routing: Tensor
    """float64 [3 L + 2], see `routing_sums`."""
    other_logprobs: Tensor | None = None
    """With replay switched over; asks for the split of the log-ratio variance."""
    replayed: bool = False
    """Whether `logprobs` was replayed (and `other_logprobs` is the live one)."""


def routing_sums(old: Tensor, new: Tensor, mask: Tensor) -> Tensor:
    """Sums of which `routing_means` makes means: they add up over parts of a batch.

    Args:
        old, new: int ids [b, T, L, K] where each response token is predicted.
        mask: bool [b, T].

    Returns:
        float64 [3 L + 2]: churn, disagreement and pairs by layer, disagreeing tokens and tokens.
    """
    churn = statistics.churn(old, new, mask)
    routers = statistics.router_disagreement(churn)
    tokens = statistics.token_disagreement(churn)
    by_layer = [values.flatten(0, -2).double() for values in (churn, routers)]
    layers = [values.nansum(0) for values in by_layer] + [(~by_layer[0].isnan()).double().sum(0)]
    whole = torch.stack([tokens.double().nansum(), (~tokens.isnan()).double().sum()])
    return torch.cat([*layers, whole])


def routing_means(sums: Tensor, prefix: str) -> dict[str, float]:
    """Churn, router and token disagreement, means over layers of means over tokens."""
    churn, routers, pairs = sums[:-2].view(3, -1)
    means = [(churn / pairs).mean(), (routers / pairs).mean(), sums[-2] / sums[-1]]
    names = ("churn", "router_disagreement", "token_disagreement")
    numbers = torch.stack(means).tolist()
    return {f"{prefix}/{name}": value for name, value in zip(names, numbers, strict=True)}


def global_routing(accelerator: Any, sums: Sequence[Tensor], prefix: str) -> dict[str, float]:
    """`routing_means` over parts and processes; every process must call it."""
    whole = accelerator.reduce(torch.stack(list(sums)).sum(0), reduction="sum")
    return routing_means(whole, prefix)


def update_metrics(accelerator: Any, parts: Sequence[MicroBatch]) -> dict[str, float]:
    """Every metric of one update; every process must call it, with equally many sequences.

    `kl` of `ratio_statistics` is left out: in TRL's logs it is the divergence from the reference
    model. It is minus `ratio/token_log_mean`.
    """
    # One tensor [b, T, 3 or 4] a part. Parts differ in T, and padding is outside the mask.
    columns = [(p.logprobs, p.old_logprobs, p.mask, p.other_logprobs) for p in parts]
    stacked = [
        torch.stack([column.detach().float() for column in part if column is not None], dim=-1)
        for part in columns
    ]
    longest = max(part.shape[1] for part in stacked)
    pad = torch.nn.functional.pad
    rows = torch.cat([pad(part, (0, 0, 0, longest - part.shape[1])) for part in stacked])
    whole: Tensor = accelerator.gather(accelerator.pad_across_processes(rows, dim=1))
    logprobs, old_logprobs, mask, *other = whole.unbind(-1)
    response = mask > 0
    metrics = global_routing(accelerator, [part.routing for part in parts], "routing")
    metrics |= ratio_statistics(logprobs, old_logprobs, response)
    del metrics["kl"]
    if other:
        live, replayed = (other[0], logprobs) if parts[0].replayed else (logprobs, other[0])
        metrics |= split_log_ratio(live, replayed, old_logprobs, response)
    return metrics
