"""The policy under training on one rank: its passes over a rollout, its gradients, its optimiser.

A rank holds some prompts of each update (see `share.py`). Losses are divided by what the
whole update holds (sequences, tokens or token budget, by `aggregation`) and gradients summed over
ranks, so that the number of ranks changes nothing but rounding; metrics are of the whole update on
every rank.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_rl.batch import Experience, response_positions
from moe_rl.config import Aggregation, RunConfig
from moe_rl.losses import Algorithm, aggregate, make_inputs, resolve_options
from moe_rl.losses.custom import choose_algorithm
from moe_rl.losses.ppo import value_loss
from moe_rl.metrics import instruments
from moe_rl.policy.forward import ForwardOutput
from moe_rl.policy.policy import Policy
from moe_rl.policy.probe import has_unused_parameters
from moe_rl.routing import find_routers
from moe_rl.routing.statistics import router_shift_ratio
from moe_rl.runtime.ranks import Ranks
from moe_rl.runtime.stopwatch import Stopwatch
from moe_rl.runtime.wrapped import Parallelism, Wrapped, clip_gradients
from moe_rl.training.master_weights import MasterWeights
from moe_rl.training.passes import Forward, Passes
from moe_rl.training.replay_plan import ReplayPlan
from moe_rl.training.share import Share
from moe_rl.training.value_head import ValueHead


def loss_options(config: RunConfig, algorithm: Algorithm) -> dict[str, float]:
    """The options of the run's loss; the published ones where the config leaves them out.

    A user's own loss may mean any scale by its clip range.

    Raises:
        ValueError: an option that the loss does not have, or a clip range of the other kind of
            ratio, unless the config allows it.
    """
    given = {"clip_low": config.clip_low, "clip_high": config.clip_high, **config.loss_options}
    return resolve_options(
        config.loss or config.algorithm,
        algorithm,
        given,
        allow_any_scale=config.allow_any_clip_scale or config.loss is not None,
    )


@dataclass(frozen=True, kw_only=True)
class Passed:
    """A forward and backward pass and what came out."""

    forward: Forward
    output: ForwardOutput
    """Of the forward pass; `logprobs.grad` is the gradient of the loss."""
    loss: float


class Learner:
    """Gradients of one run's loss, and the steps along them.

    Args:
        config: the run.
        policy: trained in place.
        clock: gets the times of updates and instruments.
        ranks: processes that train together.
        parallelism: how they share the policy.
        max_tokens: longest response, which `fixed_length` divides by.

    Raises:
        ConfigError: more ranks than prompts.
        ValueError: see `loss_options`.
    """

    def __init__(
        self,
        config: RunConfig,
        policy: Policy,
        clock: Stopwatch,
        ranks: Ranks,
        parallelism: Parallelism = "ddp",
        *,
        max_tokens: int,
    ) -> None:
        self.config, self.policy, self.clock, self.ranks = config, policy, clock, ranks
        self.max_tokens = max_tokens
        self.share = Share(config, ranks.rank, ranks.size)
        self.algorithm = choose_algorithm(config.algorithm, config.loss, config.loss_sha256)
        self.options = loss_options(config, self.algorithm)
        self.plan = ReplayPlan(config.routing_replay)
        if config.freeze_router:
            policy.freeze_routers()
        if config.gradient_checkpointing:
            model = policy.model
            # transformers >= 5.2x renames it; the old name warns there.
            enable = getattr(model, "activation_checkpointing_enable", None)
            (enable or model.gradient_checkpointing_enable)()
        chosen = [tap.ranks_by_logits for tap in find_routers(policy.model)]
        self.by_logits = torch.tensor(chosen, device=policy.device)
        self._recomputed = [
            module
            for module in policy.model.modules()
            if getattr(module, "gradient_checkpointing", False)
        ]
        self.value_head = ValueHead(config, policy) if self.algorithm.learns_value else None
        unused = ranks.size > 1 and parallelism == "ddp" and has_unused_parameters(policy)
        self.wrapped = Wrapped(policy.model, ranks, parallelism, self.value_head, unused=unused)
        self.passes = Passes(
            config=config,
            policy=policy,
            wrapped=self.wrapped,
            share=self.share,
            plan=self.plan,
            value_head=self.value_head,
            reads_routers=config.instruments or self.algorithm.reads_routers,
        )
        self.seen_logprobs: Tensor | None = None
        """[B, T], which the updates fill with the log-probs they see, where the trainer asks."""
        self.weights = MasterWeights(policy.model.parameters())
        groups: list[dict[str, Any]] = [{"params": self.weights.masters, "rate": 1.0}]
        if self.value_head is not None:  # float32, whatever the policy's dtype
            groups += [{"params": [*self.value_head.parameters()], "rate": config.value_rate}]
        self.parameters = [p for group in groups for p in group["params"]]
        self._elements = ranks.total(self.weights.elements)
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def named_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Parameters of the policy and of the value head, in the optimiser's order."""
        named = dict(self.policy.model.named_parameters())
        if self.value_head is not None:
            named |= self.value_head.named_parameters(prefix="value_head")
        return named

    def stepped_parameters(self) -> dict[str, torch.nn.Parameter]:
        """What the optimiser steps for each trained parameter: itself, or its float32 master."""
        named = self.named_parameters().items()
        names = [name for name, parameter in named if parameter.requires_grad]
        return dict(zip(names, self.parameters, strict=True))

    def set_learning_rate(self, rate: float) -> None:
        """Take the policy's learning rate of a rollout step; the value head's is in proportion."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate"]

    def gradients(self, experience: Experience, step: int, update: int) -> list[Passed]:
        """Forward and backward passes of one update; gradients are left at the parameters."""
        forwards = self.passes.of_update(update)
        divisor = self._divisor(experience, update)
        passed = []
        for number, forward in enumerate(forwards, 1):
            part = experience.select_prompts(forward.prompts)
            mask = part.batch.response_mask
            with self.wrapped.backward(last=number == len(forwards)):
                output = self.passes.update_pass(part, forward, step, update)
                output.logprobs.retain_grad()
                inputs = make_inputs(
                    output.logprobs,
                    part.old_logprobs,
                    part.advantages,
                    mask if forward.counts else torch.zeros_like(mask),
                    rollout_logprobs=part.batch.rollout_logprobs,
                    router_shift=self._router_shift(part, output),
                    values=output.values,
                    old_values=part.old_values,
                    returns=part.returns,
                )
                token_losses = self.algorithm.loss(inputs, **self.options)
                loss = aggregate(token_losses, inputs, self._aggregation, divisor=divisor)
                # The ranks' gradients are averaged, and ours are sums.
                (loss * self.ranks.size).backward()
            if self.seen_logprobs is not None and forward.counts:
                rows = self.passes.rows(forward.prompts)
                self.seen_logprobs[rows] = output.logprobs.detach()
            passed.append(Passed(forward=forward, output=output, loss=loss.item()))
        return passed

    @property
    def _aggregation(self) -> Aggregation:
        return self.config.aggregation or self.algorithm.aggregation

    def _divisor(self, experience: Experience, update: int) -> float:
        """What the loss of the whole update, of all ranks, is divided by."""
        config = self.config
        sequences = config.prompts_per_rollout // config.updates_per_rollout * config.group_size
        if self._aggregation == "sequence_mean":
            return sequences
        if self._aggregation == "fixed_length":
            return sequences * self.max_tokens
        own = experience.batch.select_prompts(self.share.of_update(update))
        return self.ranks.total(float(own.response_mask.sum()))

    def _router_shift(self, experience: Experience, output: ForwardOutput) -> Tensor | None:
        """RSPO's gamma of each response token, for the losses that read it."""
        if not self.algorithm.reads_routers:
            return None
        old, new = experience.old_router_logits, output.router_logits
        assert old is not None and new is not None
        batch = experience.batch
        routes = response_positions(experience.old_routes, batch.prompt_ids.shape[1])
        return router_shift_ratio(old, new.detach(), routes, batch.response_mask)

    def update(self, experience: Experience, step: int, update: int) -> dict[str, Any]:
        """One optimiser update; returns its metrics, of all ranks.

        If the loss or its gradient is NaN or inf, the optimiser takes no step: `skipped` is then 1.
        """
        config = self.config
        with self.clock.timed("updates"), self._training_mode():
            passed = self.gradients(experience, step, update)
        metrics: dict[str, Any] = {"loss": self.ranks.total(sum(part.loss for part in passed))}
        if self.plan.is_on:
            metrics["replay/coverage"] = self._coverage(experience, passed)
        if config.instruments:
            with self.clock.timed("instruments"):
                metrics |= self.observe(experience, passed, step, update)
        with self.clock.timed("updates"):
            norm = self.clip_gradients(config.max_grad_norm)
            # Both are sums over ranks: all of them decide alike.
            skipped = not (math.isfinite(norm) and math.isfinite(metrics["loss"]))
        before = None
        if config.instruments:
            with self.clock.timed("instruments"):
                before = self.weights.copies()
        with self.clock.timed("updates"):
            if not skipped:
                self.weights.step(self.optimizer)
            self.optimizer.zero_grad(set_to_none=True)
        if before is not None:
            with self.clock.timed("instruments"):
                moved = self.ranks.total(self.weights.count_moved(before))
                metrics["weights/moved_share"] = moved / self._elements
        return metrics | {"grad_norm": norm, "skipped": int(skipped)}

    def _coverage(self, experience: Experience, passed: list[Passed]) -> float:
        """Share of response (token, layer) pairs, of all ranks, that were really replayed."""
        covered = pairs = 0.0
        for part in passed:
            if part.forward.counts:
                mask = experience.batch.select_prompts(part.forward.prompts).response_mask
                assert part.output.replayed is not None
                found = instruments.coverage_sums(part.output.replayed, mask).tolist()
                covered, pairs = covered + found[0], pairs + found[1]
        return self.ranks.total(covered) / self.ranks.total(pairs)

    def clip_gradients(self, most: float) -> float:
        """Scale the gradients of all ranks to a norm of at most `most`; return the one before."""
        self.weights.take_gradients()
        return clip_gradients(self.parameters, most)

    @torch.no_grad()
    def observe(
        self, experience: Experience, passed: list[Passed], step: int, update: int
    ) -> dict[str, Any]:
        """All metrics of one update, taken before the weights move."""
        config = self.config
        every, last = config.attribution_every, update == config.updates_per_rollout - 1
        sampled = bool(last and every and step % every == 0)
        attribute = sampled and self.passes.can_be_split
        outputs = [part.output.select_sequences(part.forward.counted) for part in passed]
        output = ForwardOutput.concatenate(outputs)
        others = [
            torch.cat(
                [
                    self.passes.update_pass(
                        experience.select_prompts(part.forward.prompts),
                        part.forward,
                        step,
                        update,
                        plan,
                    ).logprobs[part.forward.counted]
                    for part in passed
                ]
            )
            for plan in (self.plan.contrasts if attribute else ())
        ]
        gradients = [
            part.output.logprobs.grad[part.forward.counted]  # type: ignore[index]
            for part in passed
        ]
        own = experience.select_prompts(self.share.of_update(update))
        value_losses = None
        if output.values is not None and own.old_values is not None and own.returns is not None:
            value_losses = value_loss(
                output.values, own.old_values, own.returns, self.options["value_clip"]
            )
        return instruments.update_metrics(
            output,
            own,
            gradient=torch.cat(gradients),
            by_logits=self.by_logits,
            value_losses=value_losses,
            other_logprobs=others,
            replayed=self.plan.is_on,
            per_position=sampled,
            gather=self.ranks.gather,
        )

    @contextmanager
    def _training_mode(self) -> Iterator[None]:
        """Training mode of the very modules that recompute activations, which ask for it.

        Those inside stay in evaluation mode: dropout and jitter would draw from a state that no
        seed decides. And all of them do while it samples, or their cache would be taken away.
        """
        for module in self._recomputed:
            module.training = True
        try:
            yield
        finally:
            for module in self._recomputed:
                module.training = False
