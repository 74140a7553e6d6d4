"""The noise of a forward pass: seeded draws that stand for the rounding of another engine.

Two engines with equal weights disagree on about 10% of routers (R3, arXiv 2510.11370), because
their kernels round differently. A small fp32 model has no such differences, so they are added:
independent Gaussian noise on the router logits, per forward pass, for the choice of experts only
(`moe_rl.routing.router_noise` is the context that adds it), or on the last hidden states, where two
passes then disagree as much without any routing.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe_rl.runtime.seeding import generator

NoiseDraw = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class PassNoise:
    """Noise of one forward pass over P prompts and G responses each.

    Every value is a pure function of (seed, purpose, step, prompt, sample, layer, position) and the
    group size, so a minibatch or a rank that holds some of the prompts draws the same for them.
    """

    std: float
    """Standard deviation of the noise on router logits; 0: none is drawn."""
    hidden_std: float = 0.0
    """Standard deviation of the noise on the hidden states that predict response tokens."""
    seed: int
    step: int
    purpose: str
    """Which forward pass: two passes with different purposes are independent."""
    prompts: range
    """Numbers of the prompts in the pass."""
    group_size: int

    def for_prompts(self) -> NoiseDraw | None:
        """Draws for a pass over the prompts alone, one row per prompt: logits [P * s, E]."""
        return self._draw("router_noise", self.std, 0) if self.std else None

    def for_responses(self) -> NoiseDraw | None:
        """Draws for responses read at once or token by token: logits [B * s, E]."""
        return self._draw("router_noise", self.std, self.group_size) if self.std else None

    def hidden_adder(self) -> Callable[[Tensor], Tensor]:
        """Adds noise to hidden states [B, H] or [B, T, H]; successive calls are of later tokens."""
        if not self.hidden_std:
            return lambda hidden: hidden
        draw = self._draw("hidden_noise", self.hidden_std, self.group_size)

        def add(hidden: Tensor) -> Tensor:
            noise = draw(0, hidden.reshape(-1, hidden.shape[-1]))
            return hidden + noise.view(hidden.shape).to(hidden.dtype)

        return add

    def for_sequences(self, prompt_length: int) -> NoiseDraw | None:
        """Draws for whole sequences: the values of `for_prompts` and `for_responses`, joined."""
        rows = self.for_rows(prompt_length)
        if rows is None:
            return None

        def draw(layer: int, logits: Tensor) -> Tensor:
            whole = logits.reshape(len(self.prompts) * self.group_size, -1, logits.shape[-1])
            head, tail = whole[:: self.group_size, :prompt_length], whole[:, prompt_length:]
            noise = rows(layer, torch.cat([head.flatten(0, 1), tail.flatten(0, 1)]))
            split = head.shape[:2].numel()
            shared = noise[:split].view(head.shape).repeat_interleave(self.group_size, dim=0)
            return torch.cat([shared, noise[split:].view(tail.shape)], dim=1).view(logits.shape)

        return draw

    def for_rows(self, prompt_length: int) -> NoiseDraw | None:
        """Draws for the rows of all prompts, then of all responses: logits [P * Sp + B * s, E]."""
        prompts, responses = self.for_prompts(), self.for_responses()
        if prompts is None or responses is None:
            return None
        split = len(self.prompts) * prompt_length

        def draw(layer: int, logits: Tensor) -> Tensor:
            return torch.cat([prompts(layer, logits[:split]), responses(layer, logits[split:])])

        return draw

    def _draw(self, kind: str, std: float, samples: int) -> NoiseDraw:
        """Draws for `samples` rows a prompt; 0 stands for the prompt itself, one row."""
        streams: dict[int, list[np.random.Generator]] = {}

        def draw(layer: int, logits: Tensor) -> Tensor:
            # Successive calls for one layer continue its streams: one call per decoded token.
            if layer not in streams:
                purpose = f"{kind}/{self.purpose}/{layer}"
                streams[layer] = [
                    # One stream for a whole group: to make one costs as much as many draws.
                    generator(self.seed, purpose, step=self.step, prompt=prompt, sample=samples)
                    for prompt in self.prompts
                ]
            rows, experts = max(samples, 1), logits.shape[-1]
            positions = logits.numel() // (len(self.prompts) * rows * experts)
            shape = (positions, rows, experts)
            values = np.stack([s.standard_normal(shape, np.float32) for s in streams[layer]])
            # [P, s, G, E] to [P, G, s, E], the order of the logits.
            noise = torch.from_numpy(values).transpose(1, 2).reshape(logits.shape)
            return noise.to(logits.device).mul_(std)

        return draw
