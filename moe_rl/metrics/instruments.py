"""The instruments: every metric of a rollout and of an update, from tensors to plain numbers.

The routing of response token t is that at the position where it is predicted, one before its own;
positions of the prompt alone and the last one, which is never read, do not count. Definitions:
docs/metrics.md. Everything here runs without gradients.

Where several processes train together, each passes its own sequences and a `gather`, which joins
the rows of all of them, so that metrics are those of the whole batch. It is called once per set of
metrics. Router logits are too large to send: they are reduced to numbers per token before it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_rl.batch import Experience, RolloutBatch, response_positions
from moe_rl.kernels import routing_statistics
from moe_rl.kernels.routing_stats import choose_routing_backend
from moe_rl.metrics.branches import branch_shares
from moe_rl.metrics.ratios import (
    clip_shares,
    gate_statistics,
    mismatch_statistics,
    ratio_statistics,
    ratio_tail,
    split_log_ratio,
)
from moe_rl.policy.forward import ForwardOutput
from moe_rl.routing import statistics

Tables = Mapping[str, Tensor]
Gather = Callable[[Tables], dict[str, Tensor]]
"""`dict`, the default, is that of a process that trains alone."""


@torch.no_grad()
def rollout_metrics(
    batch: RolloutBatch, old: ForwardOutput, *, by_logits: Tensor, gather: Gather = dict
) -> dict[str, Any]:
    """The old policy's routing on a rollout: margin, confidence, entropy and load.

    `old` is its pass over the batch, with router logits; token entropy where it has it. `by_logits`
    bool [L] is False for routers that choose by more than their logits, which have no margin.
    """
    assert old.routed_experts is not None and old.router_logits is not None
    mask, logits = batch.response_mask, old.router_logits
    routes = response_positions(old.routed_experts, batch.prompt_ids.shape[1])
    router = router_statistics(logits, routes, mask)
    router["margin"] = router["margin"].masked_fill(~by_logits, torch.nan)
    own = {"routes": routes, "mask": mask, **router}
    if old.entropy is not None:
        own["token_entropy"] = old.entropy
    rows = gather(own)
    load = statistics.load(rows["routes"], logits.shape[-1], rows["mask"])
    layers = {f"routing/{name}": statistics.per_layer(rows[name]) for name in router}
    for statistic in (statistics.load_cv, statistics.max_vio, statistics.dead_experts):
        layers[f"routing/{statistic.__name__}"] = statistic(load)
    metrics = _by_layer(layers)
    if old.entropy is not None:
        metrics["entropy"] = rows["token_entropy"][rows["mask"]].mean().item()
    return metrics


@torch.no_grad()
def mismatch_metrics(
    batch: RolloutBatch, old: ForwardOutput, *, gather: Gather = dict
) -> dict[str, Any]:
    """How far the rollout engine and the trainer differ on equal weights."""
    assert old.routed_experts is not None
    mask, prompt_length = batch.response_mask, batch.prompt_ids.shape[1]
    engine = response_positions(batch.routed_experts, prompt_length)
    trainer = response_positions(old.routed_experts, prompt_length)
    rows = gather(
        {
            "churn": statistics.churn(engine, trainer, mask),
            "logprobs": old.logprobs,
            "rollout_logprobs": batch.rollout_logprobs,
            "mask": mask,
        }
    )
    return {
        **mismatch_statistics(rows["logprobs"], rows["rollout_logprobs"], rows["mask"]),
        **_disagreement("mismatch", rows["churn"]),
    }


@torch.no_grad()
def value_metrics(
    batch: RolloutBatch, values: Tensor, rewards: Tensor, *, gather: Gather = dict
) -> dict[str, float]:
    """How well the values [B, T] of a rollout foretold its rewards [B]."""
    mask = batch.response_mask
    rows = gather({"values": values, "rewards": rewards, "mask": mask})
    mask = rows["mask"]
    reward = rows["rewards"].double()[:, None].expand_as(mask)[mask]
    missed = reward - rows["values"].double()[mask]
    spread = reward.var(correction=0)
    explained = 1 - missed.var(correction=0) / spread if spread > 0 else torch.nan * spread
    return {"value/explained_variance": explained.item()}


@torch.no_grad()
def update_metrics(
    output: ForwardOutput,
    experience: Experience,
    *,
    gradient: Tensor,
    by_logits: Tensor,
    value_losses: Tensor | None = None,
    other_logprobs: Sequence[Tensor] = (),
    replayed: bool = False,
    per_position: bool = False,
    gather: Gather = dict,
) -> dict[str, Any]:
    """Every metric of one optimiser update, from its forward pass, before the weights move.

    Args:
        output: the forward pass of the update, with live choices and router logits.
        experience: what the update learns from.
        gradient: float32 [B, T], of the loss in each log-prob.
        by_logits: see `rollout_metrics`.
        value_losses: float32 [B, T], of a value head.
        other_logprobs: of the same pass with replay off instead of on or on instead of off; adds
            the split of the log-ratio variance into routing part and weight part. Where gate
            weights are replayed, also those with the ids alone; adds the gate part.
        replayed: whether `output` was replayed, so that the first of `other_logprobs` is live.
        per_position: add churn by response position.
        gather: joins the rows of all processes.
    """
    assert output.routed_experts is not None
    batch, advantages = experience.batch, experience.advantages
    mask, prompt_length = batch.response_mask, batch.prompt_ids.shape[1]
    old = response_positions(experience.old_routes, prompt_length)
    new = response_positions(output.routed_experts, prompt_length)
    own = {
        "mask": mask,
        "logprobs": output.logprobs,
        "old_logprobs": experience.old_logprobs,
        "rollout_logprobs": batch.rollout_logprobs,
        "gradient": gradient,
        "advantages": advantages if advantages.ndim == 2 else advantages[:, None].expand_as(mask),
        "churn": statistics.churn(old, new, mask),
    }
    logits = output.router_logits
    if logits is not None:
        margin = statistics.margin(logits, old.shape[-1], mask)
        own["margin"] = margin.masked_fill(~by_logits, torch.nan)
        before = experience.old_router_logits
        if before is not None:
            own["shift"] = statistics.router_shift_ratio(before, logits, old, mask)
    if value_losses is not None:
        own["value_losses"] = value_losses
    own |= {f"other_logprobs_{number}": other for number, other in enumerate(other_logprobs)}
    rows = gather(own)
    logprobs, mask = rows["logprobs"], rows["mask"]
    branches = branch_shares(
        rows["gradient"],
        logprobs - rows["old_logprobs"],
        rows["advantages"],
        mask,
        (rows["churn"] > 0).any(-1),
    )
    metrics: dict[str, Any] = {
        **clip_shares(rows["gradient"], rows["advantages"], mask),
        **branches,
        **ratio_statistics(logprobs, rows["old_logprobs"], mask),
        **ratio_tail(logprobs, rows["rollout_logprobs"], mask, prefix="rollout_ratio"),
        **_disagreement("routing", rows["churn"]),
    }
    if "margin" in rows:
        metrics |= _by_layer({"routing/margin": statistics.per_layer(rows["margin"])})
    if "shift" in rows:
        metrics["routing/shift"] = rows["shift"].nanmean().item()
    if value_losses is not None:
        metrics["value/loss"] = rows["value_losses"][mask].double().mean().item()
    if per_position:
        metrics["routing/churn_per_position"] = rows["churn"].nanmean(dim=(0, 2)).tolist()
    if other_logprobs:
        live, replay = logprobs, rows["other_logprobs_0"]
        if replayed:
            live, replay = replay, live
        if len(other_logprobs) > 1:
            ids = rows["other_logprobs_1"]
            metrics |= gate_statistics(live, ids, replay, rows["rollout_logprobs"], mask)
            replay = ids
        metrics |= split_log_ratio(live, replay, rows["old_logprobs"], mask)
    return metrics


def coverage_sums(replayed: Tensor, mask: Tensor) -> Tensor:
    """What `replay/coverage` is the quotient of: sums, which add up over parts of a batch.

    Args:
        replayed: bool [B, T, L], routers that were given their recorded choice.
        mask: bool [B, T], response tokens.

    Returns:
        float64 [2]: (token, layer) pairs that were replayed, and all.
    """
    rows = replayed[mask]
    return torch.tensor([rows.sum(), rows.numel()], dtype=torch.float64, device=mask.device)


def router_statistics(logits: Tensor, routes: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Margin, confidence and entropy of the routers, `[B, T, L]`, NaN where they do not count.

    On a GPU one kernel reads the logits `[B, T, L, E]` once for all three; a CPU is faster with one
    operator after the other. `routing/statistics.py` defines them.
    """
    if choose_routing_backend("auto", logits.device).name == "reference":
        return {
            "margin": statistics.margin(logits, routes.shape[-1], mask),
            "confidence": statistics.confidence(logits, routes, mask),
            "entropy": statistics.entropy(logits, mask),
        }
    found = routing_statistics(logits, routes)
    outside = ~mask.unsqueeze(-1)
    no_record = outside | (routes < 0).any(dim=-1)
    return {
        "margin": found.margin.masked_fill(outside, torch.nan),
        "confidence": found.replay_weights.sum(dim=-1).masked_fill(no_record, torch.nan),
        "entropy": found.entropy.masked_fill(outside, torch.nan),
    }


def _disagreement(prefix: str, churn: Tensor) -> dict[str, Any]:
    """Shares of expert slots (GSPO's 10%), of routers (R3's 10%) and of tokens that differ."""
    layers = {
        f"{prefix}/churn": statistics.per_layer(churn),
        f"{prefix}/router_disagreement": statistics.per_layer(
            statistics.router_disagreement(churn)
        ),
    }
    tokens = statistics.token_disagreement(churn).nanmean().item()
    return _by_layer(layers) | {f"{prefix}/token_disagreement": tokens}


def _by_layer(layers: dict[str, Tensor]) -> dict[str, Any]:
    """Each quantity's mean over layers, and its list `<name>_per_layer`; one read for all."""
    table = torch.stack(list(layers.values())).tolist()
    metrics: dict[str, Any] = {}
    for name, values in zip(layers, table, strict=True):
        metrics[name] = sum(values) / len(values)
        metrics[f"{name}_per_layer"] = values
    return metrics
