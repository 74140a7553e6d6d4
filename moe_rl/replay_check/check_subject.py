"""Replay check: a model under check, its inputs, and what laws compare."""

from typing import Any

import torch
from torch import Tensor, nn

from moe_rl.replay_check.claims import Claims
from moe_rl.replay_check.experts_watch import Seen
from moe_rl.replay_check.families import Formula
from moe_rl.routing.record import record_routing
from moe_rl.routing.taps import RouterTap, find_routers

BATCH, LENGTH = 3, 9


class Subject:
    """A model under check, its inputs, and its output without record or replay."""

    def __init__(self, model: nn.Module, formula: Formula | None, seed: int) -> None:
        self.model: Any = model
        self.formula = formula
        self.taps = find_routers(model)
        self.tap = self.taps[0]  # all agree in E and K
        config: Any = model.config
        self.config = config.get_text_config()
        self.generator = torch.Generator().manual_seed(seed)
        device = next(model.parameters()).device
        self.tokens = torch.randint(
            2, self.config.vocab_size, (BATCH, LENGTH), generator=self.generator
        ).to(device)
        self.plain = self.output()
        self.pull = torch.randn(self.plain.shape, generator=self.generator).to(device)

    @torch.no_grad()
    def output(self, tokens: Tensor | None = None, **inputs: Any) -> Tensor:
        """`forward` without gradients."""
        return self.forward(tokens, **inputs)

    def forward(self, tokens: Tensor | None = None, **inputs: Any) -> Tensor:
        """Logits `[B, S, V]`, or the hidden states of a model without a head."""
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


def experts_got(subject: Subject, seen: Seen, routes: Tensor) -> Claims:
    """The experts were called with the recorded ids, in any order."""
    for layer, (used, weights) in seen.items():
        expected = routes[:, :, layer].reshape(-1, subject.tap.top_k).to(used)
        differs = (sort_ids(used) != sort_ids(expected)) & (weights != 0)
        rows = differs.any(-1)
        yield (
            not bool(rows.any()),
            f"layer {layer}: experts are called with {used[rows][:1].tolist()}, the record says "
            f"{expected[rows][:1].tolist()}",
        )


def sort_ids(routes: Tensor) -> Tensor:
    """Ids `[..., K]` ascending: equal for equal sets of experts."""
    return routes.sort(dim=-1).values


def difference(name: str, got: Tensor, expected: Tensor) -> str:
    """What is wrong with a value that replay has changed."""
    return f"{name}: {relative(got, expected):.1e} from the same without replay"


def relative(got: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value."""
    return float((got - expected).abs().max() / (expected.abs().max() + 1e-30))
