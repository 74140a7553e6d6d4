"""Integrations: the instruments of an update of TRL's GRPOTrainer, over all that it consists of.

An update is some micro-batches on some processes. Variances and quantiles of parts do not average
to those of the whole, so the parts are kept until the optimiser steps, gathered, and measured as
one batch: each process gets the same numbers. Definitions: docs/metrics.md.

Shapes: b sequences of a micro-batch, T response positions, L MoE layers, K experts a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moe_rl.metrics.branches import branch_shares
from moe_rl.metrics.ratios import ratio_statistics, ratio_tail, split_log_ratio
from moe_rl.routing import statistics


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What one forward pass of an update leaves for its metrics; log-probs `[b, T]` in nats."""

    logprobs: Tensor
    """Of the forward in the loss."""
    old_logprobs: Tensor
    advantages: Tensor
    """[b, T]"""
    mask: Tensor
    """bool [b, T], response tokens."""
    churn: Tensor
    """[b, T, L], of the old policy's live choices against this forward's."""
    gradient: Tensor | None = None
    """[b, T], of the loss in each log-prob; None before backward."""
    rollout_logprobs: Tensor | None = None
    """Of the engine that sampled, where TRL has them."""
    other_logprobs: Tensor | None = None
    """With replay switched over; asks for the split of the log-ratio variance."""
    replayed: bool = False
    """Whether `logprobs` was replayed (and `other_logprobs` is the live one)."""

    def after_backward(self) -> "MicroBatch":
        """The same with the gradient that backward left at the log-probs, and without the graph."""
        assert self.logprobs.grad is not None, "retain_grad comes before backward"
        return replace(self, logprobs=self.logprobs.detach(), gradient=self.logprobs.grad)

    def columns(self) -> dict[str, Tensor]:
        """What every token has, by name, [b, T] each; parts of an update have equal names."""
        found = {
            "logprobs": self.logprobs,
            "old_logprobs": self.old_logprobs,
            "advantages": self.advantages,
            "mask": self.mask,
            "flipped": (self.churn > 0).any(-1),
            "gradient": self.gradient,
            "rollout_logprobs": self.rollout_logprobs,
            "other_logprobs": self.other_logprobs,
        }
        return {name: value.float() for name, value in found.items() if value is not None}


def routing_sums(churn: Tensor) -> Tensor:
    """Sums of which `routing_means` makes means: they add up over parts of a batch.

    Args:
        churn: [b, T, L], see `statistics.churn`.

    Returns:
        float64 [3 L + 2]: churn, disagreement and pairs by layer, disagreeing tokens and tokens.
    """
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


def global_routing(accelerator: Any, churn: Sequence[Tensor], prefix: str) -> dict[str, float]:
    """`routing_means` over parts and processes; every process must call it."""
    sums = torch.stack([routing_sums(part) for part in churn]).sum(0)
    return routing_means(accelerator.reduce(sums, reduction="sum"), prefix)


def global_coverage(accelerator: Any, parts: Sequence[Tensor]) -> dict[str, float]:
    """`replay/coverage` over parts, `coverage_sums` each, and processes, all of which call it."""
    sums = accelerator.reduce(torch.stack(list(parts)).sum(0), reduction="sum")
    return {"replay/coverage": float(sums[0] / sums[1])}


def update_metrics(accelerator: Any, parts: Sequence[MicroBatch]) -> dict[str, float]:
    """Every metric of one update; every process must call it, with equally many sequences.

    `kl` of `ratio_statistics` is left out: in TRL's logs it is the divergence from the reference
    model. It is minus `ratio/token_log_mean`. So are the clip shares, which TRL logs itself.
    """
    metrics = global_routing(accelerator, [part.churn for part in parts], "routing")
    # One tensor [b, T, columns] a part. Parts differ in T, and padding is outside the mask.
    names = list(parts[0].columns())
    stacked = [torch.stack(list(part.columns().values()), dim=-1) for part in parts]
    longest = max(part.shape[1] for part in stacked)
    pad = torch.nn.functional.pad
    rows = torch.cat([pad(part, (0, 0, 0, longest - part.shape[1])) for part in stacked])
    whole = accelerator.gather(accelerator.pad_across_processes(rows, dim=1))
    column: dict[str, Tensor] = dict(zip(names, whole.unbind(-1), strict=True))
    logprobs, old_logprobs, mask = column["logprobs"], column["old_logprobs"], column["mask"] > 0
    metrics |= ratio_statistics(logprobs, old_logprobs, mask)
    del metrics["kl"]
    metrics |= branch_shares(
        column["gradient"],
        logprobs - old_logprobs,
        column["advantages"],
        mask,
        column["flipped"] > 0,
    )
    if "rollout_logprobs" in column:
        engine = column["rollout_logprobs"]
        metrics |= ratio_tail(logprobs, engine, mask, prefix="rollout_ratio")
    if "other_logprobs" in column:
        live, replayed = logprobs, column["other_logprobs"]
        if parts[0].replayed:
            live, replayed = replayed, live
        metrics |= split_log_ratio(live, replayed, old_logprobs, mask)
    return metrics
