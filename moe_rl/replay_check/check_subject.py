"""Replay check: a model under check, and the words in which a law is stated about it."""

from typing import Any

import torch
from torch import Tensor, nn

from moe_rl.replay_check.experts_watch import Seen, watch_experts
from moe_rl.replay_check.gate_formula import Formula
from moe_rl.routing.record import record_routing
from moe_rl.routing.taps import RouterTap, find_routers

BATCH, LENGTH = 3, 9


class LawBroken(AssertionError):
    """A law does not hold; the message says where and by how much."""


class NotApplicable(Exception):
    """The law says nothing about this model; the message says why."""


class Subject:
    """A model under check: its inputs, and what it does when nobody is watching."""

    def __init__(self, model: nn.Module, formula: Formula | None, seed: int) -> None:
        self.model: Any = model
        self.formula = formula
        self.taps = find_routers(model)
        config: Any = model.config
        self.config = config.get_text_config()
        self.generator = torch.Generator().manual_seed(seed)
        device = next(model.parameters()).device
        self.tokens = torch.randint(
            2, self.config.vocab_size, (BATCH, LENGTH), generator=self.generator
        ).to(device)
        self.plain = self.output()
        self.pull = torch.randn(self.plain.shape, generator=self.generator).to(device)

    @property
    def tap(self) -> RouterTap:
        """Any of the routers: they agree in E and K."""
        return self.taps[0]

    def output(self, tokens: Tensor | None = None, **inputs: Any) -> Tensor:
        """Logits `[B, S, V]` without gradients, or the hidden states of a model without a head."""
        with torch.no_grad():
            return self.forward(tokens, **inputs)

    def forward(self, tokens: Tensor | None = None, **inputs: Any) -> Tensor:
        """The same with gradients."""
        inputs.setdefault("use_cache", False)
        out = self.model(input_ids=self.tokens if tokens is None else tokens, **inputs)
        return out.logits if "logits" in out else out.last_hidden_state

    def loss(self) -> Tensor:
        """A scalar that depends on every output."""
        return (self.forward().float() * self.pull).sum() / self.pull.numel()

    def gradient(self) -> dict[str, Tensor]:
        """Gradients by name, taken off the model."""
        found = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad(set_to_none=True)
        return found

    def record(self) -> Tensor:
        """The model's own routes `[B, S, L, K]`."""
        with record_routing(self.model) as recorded:
            self.output()
        return recorded.routed_experts

    def foreign(self) -> Tensor:
        """Random routes `[B, S, L, K]`, different within a token."""
        shape = (BATCH, LENGTH, len(self.taps), self.tap.num_experts)
        draws = torch.rand(shape, generator=self.generator)
        return draws.topk(self.tap.top_k, dim=-1).indices.to(self.tokens.device, torch.int16)

    def router_parameters(self, tap: RouterTap) -> list[nn.Parameter]:
        """The parameters that score experts; those of the experts of a tapped block are not."""
        named = tap.module.named_parameters()
        return [p for name, p in named if p.requires_grad and not name.startswith("experts.")]


def require(holds: bool, message: str) -> None:
    """Raise LawBroken unless a law holds."""
    if not holds:
        raise LawBroken(message)


def watching(subject: Subject) -> Any:
    """What the experts of the subject are called with."""
    return watch_experts(subject.model, subject.taps)


def require_used(subject: Subject, seen: Seen, routes: Tensor) -> None:
    """The experts were called with the recorded ids, in any order."""
    for layer, (used, weights) in seen.items():
        expected = routes[:, :, layer].reshape(-1, subject.tap.top_k).to(used)
        differs = (used.sort(dim=-1).values != expected.sort(dim=-1).values) & (weights != 0)
        require(
            not bool(differs.any()),
            f"layer {layer}: experts are called with {used[differs.any(-1)][:1].tolist()}, the "
            f"record says {expected[differs.any(-1)][:1].tolist()}",
        )


def same_sets(a: Tensor, b: Tensor) -> bool:
    """Whether two records choose the same sets."""
    return torch.equal(a.sort(dim=-1).values, b.sort(dim=-1).values)


def share_equal(a: Tensor, b: Tensor) -> float:
    """Share of (token, layer) pairs with equal sets."""
    same = (a.sort(dim=-1).values == b.sort(dim=-1).values).all(dim=-1)
    return float(same.float().mean())


def difference(name: str, got: Tensor, expected: Tensor) -> str:
    """The message of a value that replay has changed."""
    return f"{name}: {relative(got, expected):.1e} from the same without replay"


def relative(got: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value."""
    return float((got - expected).abs().max() / (expected.abs().max() + 1e-30))
