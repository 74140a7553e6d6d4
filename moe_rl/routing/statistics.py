"""What is measured about routing, as pure functions of tensors.

Shapes: `...` any token axes (usually `[B, T]`), L MoE layers, E experts, K experts per token.
`router_logits` are raw, `[..., L, E]`; `routed_experts` are ids `[..., L, K]`, any integer dtype.
`mask` is boolean over the token axes: True for the tokens M that count; None counts all. Another
mask, or two routings that differ in shape, are a ValueError.

Functions of tokens return float32 with NaN at tokens outside of `mask` and at (token, layer) pairs
without a record (a negative id in either routing), so that callers average what they want:

    churn(old, new, mask).nanmean()                    over M and L
    per_layer(churn(old, new, mask))                   [L]
    churn(old, new, mask).nanmean(dim=(0, 2))          by position, from [B, T, L]

Choices are sets: the order of the K ids never matters. All of them run without gradients.
"""

import torch
from torch import Tensor

from .top_k import largest


def per_layer(values: Tensor) -> Tensor:
    """Mean over all tokens that count: `[..., L]` -> `[L]`."""
    return values.flatten(0, -2).nanmean(dim=0)


def churn(e_a: Tensor, e_b: Tensor, mask: Tensor | None = None) -> Tensor:
    """|e_B \\ e_A| / K, the share of experts of B that A did not choose. `[..., L]` in [0, 1].

    GSPO (arXiv 2507.18071, section 5.3) reports roughly 10% a gradient update for a 48-layer model.
    """
    _require_same_shape("e_a", e_a, "e_b", e_b)
    shared = e_b == e_a[..., :1]
    for k in range(1, e_a.shape[-1]):
        shared |= e_b == e_a[..., k : k + 1]
    share = (~shared).float().mean(dim=-1)
    return _only(share, mask, _recorded(e_a) & _recorded(e_b))


def router_disagreement(churn: Tensor) -> Tensor:
    """1 where the two sets of experts differ, else 0, from their `churn`. `[..., L]`.

    Its mean is the share of routers that disagree (R3, arXiv 2510.11370: about 10% between
    engines).
    """
    return torch.where(churn.isnan(), churn, (churn > 0).float())


def token_disagreement(churn: Tensor) -> Tensor:
    """1 for a token with at least one layer whose sets differ, else 0, from `churn`. `[...]`.

    R3 (arXiv 2510.11370) reports 94%. Grows with depth: never compare models of different L.
    NaN for a token without a record at any layer.
    """
    known = ~churn.isnan()
    differ = (churn.nan_to_num(0.0) > 0).any(dim=-1).float()
    return differ.masked_fill(~known.any(dim=-1), torch.nan)


def disagreement(churn: Tensor) -> dict[str, float]:
    """The means of `churn` and of both disagreements over all that counts, by their names."""
    return {
        "churn": float(churn.nanmean()),
        "router_disagreement": float(router_disagreement(churn).nanmean()),
        "token_disagreement": float(token_disagreement(churn).nanmean()),
    }


def margin(router_logits: Tensor, top_k: int, mask: Tensor | None = None) -> Tensor:
    """Logit of the K-th choice minus that of the (K+1)-th. `[..., L]`, at least 0.

    How far the router is from a different set. +inf where E == K: there is no other set.
    """
    logits = router_logits.detach().float()
    if top_k == logits.shape[-1]:
        gap = torch.full_like(logits[..., 0], float("inf"))
    else:
        best = largest(logits, top_k + 1)
        gap = best[..., -2] - best[..., -1]
    return _only(gap, mask, ~logits.isnan().any(dim=-1))


def router_shift_ratio(
    old_logits: Tensor, new_logits: Tensor, e_old: Tensor, mask: Tensor | None = None
) -> Tensor:
    """gamma = exp(-mean_l mean_k |log r_new(e_old) - log r_old(e_old)|). `[...]` in (0, 1].

    r is the softmax of the router logits over all E experts; 1 means that the routers have not
    moved on the experts the old policy chose (RSPO, arXiv 2510.23027). Layers without a record
    leave the mean.

    `e_old [..., L, K]` are the ids that the old policy chose.
    """
    _require_same_shape("old_logits", old_logits, "new_logits", new_logits)
    ids = e_old.clamp_min(0).long()
    old = old_logits.detach().float().log_softmax(dim=-1).gather(-1, ids)
    new = new_logits.detach().float().log_softmax(dim=-1).gather(-1, ids)
    moved = _only((new - old).abs().mean(dim=-1), mask, _recorded(e_old))
    return (-moved.nanmean(dim=-1)).exp()


def confidence(router_logits: Tensor, routed_experts: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax mass of the experts in use, sum_k r(e_k). `[..., L]` in (0, 1]."""
    ids = routed_experts.clamp_min(0).long()
    mass = router_logits.detach().float().softmax(dim=-1).gather(-1, ids).sum(dim=-1)
    return _only(mass, mask, _recorded(routed_experts))


def entropy(router_logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Entropy of the router's softmax over E experts, in nats. `[..., L]` in [0, log E]."""
    log_r = router_logits.detach().float().log_softmax(dim=-1)
    # A logit of -inf is an expert that cannot be chosen: it adds 0, not NaN.
    spread = -(log_r.exp() * log_r.clamp_min(torch.finfo(log_r.dtype).min)).sum(dim=-1)
    return _only(spread, mask, torch.ones_like(spread, dtype=torch.bool))


def load(routed_experts: Tensor, num_experts: int, mask: Tensor | None = None) -> Tensor:
    """Share of a layer's expert slots that goes to each expert. `[L, E]`, rows sum to 1.

    Counted over the tokens of `mask` that have a record at the layer; a layer without any has NaN.
    """
    num_layers = routed_experts.shape[-2]
    counted = _counted(_recorded(routed_experts), mask)
    layers = torch.arange(num_layers, device=routed_experts.device).unsqueeze(-1)
    # One bucket a layer beyond its experts takes whatever does not count.
    buckets = torch.where(counted.unsqueeze(-1), routed_experts.long(), num_experts)
    slots = (layers * (num_experts + 1) + buckets).flatten()
    counts = torch.bincount(slots, minlength=num_layers * (num_experts + 1))
    counts = counts.view(num_layers, num_experts + 1)[:, :num_experts].float()
    return counts / counts.sum(dim=-1, keepdim=True)


def load_cv(load: Tensor) -> Tensor:
    """Coefficient of variation of the load over experts, std / mean. `[L, E]` -> `[L]`.

    0 for equal load, sqrt(E - 1) if one expert takes all; std is that of the population.
    """
    return load.std(dim=-1, correction=0) / load.mean(dim=-1)


def max_vio(load: Tensor) -> Tensor:
    """Maximal violation of balance, max load / mean load - 1. `[L, E]` -> `[L]`.

    Source: loss-free balancing, arXiv 2408.15664, section 4.1.
    """
    return load.amax(dim=-1) / load.mean(dim=-1) - 1


def dead_experts(load: Tensor) -> Tensor:
    """SHARE of experts that no token uses, in [0, 1]. `[L, E]` -> `[L]`."""
    dead = (load == 0).float().mean(dim=-1)
    return torch.where(load.isnan().any(dim=-1), torch.nan, dead)


def _recorded(routed_experts: Tensor) -> Tensor:
    return (routed_experts >= 0).all(dim=-1)


def _only(values: Tensor, mask: Tensor | None, recorded: Tensor) -> Tensor:
    """Put NaN at the (token, layer) pairs of `values [..., L]` that do not count."""
    return values.masked_fill(~_counted(recorded, mask), torch.nan)


def _counted(recorded: Tensor, mask: Tensor | None) -> Tensor:
    """The (token, layer) pairs `[..., L]` that are recorded and in `mask`."""
    if mask is None:
        return recorded
    if mask.dtype != torch.bool or mask.shape != recorded.shape[:-1]:
        raise ValueError(
            f"mask: {mask.dtype} {list(mask.shape)} for tokens {list(recorded.shape[:-1])}; pass a "
            "boolean mask over the token axes, without the layer axis"
        )
    return recorded & mask.unsqueeze(-1)


def _require_same_shape(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(
            f"{name_b}: shape {list(b.shape)} differs from {name_a} {list(a.shape)}; pass the same "
            "tokens, layers and width for both"
        )
