"""The policy under training on one rank: its passes over a rollout, its gradients, its optimiser.

A rank holds some prompts of each update (see `runtime/share.py`). Losses are divided by the number
of sequences of the whole update and gradients summed over ranks, so that the number of ranks
changes nothing but rounding; metrics are of the whole update on every rank.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from moe_rl.batch import Experience, RolloutBatch, response_positions
from moe_rl.config import Aggregation, RunConfig
from moe_rl.losses import Algorithm, aggregate, make_inputs, resolve_options
from moe_rl.losses.custom import choose_algorithm
from moe_rl.losses.ppo import value_loss
from moe_rl.metrics import instruments
from moe_rl.policy.forward import ForwardOptions, ForwardOutput, response_pass
from moe_rl.policy.policy import Policy
from moe_rl.policy.router_noise import RouterNoise
from moe_rl.routing.statistics import shift
from moe_rl.runtime.ranks import Ranks
from moe_rl.runtime.share import Share
from moe_rl.runtime.stopwatch import Stopwatch
from moe_rl.runtime.wrapped import Parallelism, Wrapped, clip_gradients
from moe_rl.training.replay_plan import ReplayPlan
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


NoisyPass = Literal["rollout", "old", "update"]


@dataclass(frozen=True, kw_only=True)
class Forward:
    """One forward pass of an update on this rank."""

    prompts: slice
    """In the rank's batch."""
    counts: bool = True
    """False: made only because another rank has one more."""

    @property
    def counted(self) -> slice:
        """The sequences of the pass that count."""
        return slice(None) if self.counts else slice(0, 0)


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
        self._recomputed = [
            module
            for module in policy.model.modules()
            if getattr(module, "gradient_checkpointing", False)
        ]
        self.value_head = ValueHead(config, policy) if self.algorithm.learns_value else None
        self.wrapped = Wrapped(policy.model, ranks, parallelism, self.value_head)
        groups: list[dict[str, Any]] = [{"params": [*policy.model.parameters()], "rate": 1.0}]
        if self.value_head is not None:
            groups += [{"params": [*self.value_head.parameters()], "rate": config.value_rate}]
        for group in groups:
            group["params"] = [p for p in group["params"] if p.requires_grad]
        self.parameters = [p for group in groups for p in group["params"]]
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

    def set_learning_rate(self, rate: float) -> None:
        """Take the policy's learning rate of a rollout step; the value head's is in proportion."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate"]

    @torch.no_grad()
    def old_pass(self, batch: RolloutBatch, step: int) -> ForwardOutput:
        """The old policy over the rollout, in the very batches that the updates will use.

        Equal shapes make the first update's ratios 1 up to rounding. Where `old_logprobs` says so,
        the log-probs are the engine's, and a pass is made only for routes that R2 replays, or for
        values.
        """
        from_engine = self.config.old_logprobs == "rollout"
        if self.old_passes == 0:
            return ForwardOutput(
                logprobs=batch.rollout_logprobs,
                entropy=None,
                routed_experts=batch.routed_experts,
                router_logits=batch.router_logits,
            )
        output = self._old_forward(batch, step)
        if from_engine:
            return output._replace(logprobs=batch.rollout_logprobs)
        others = [
            self._old_forward(batch, step, number).logprobs for number in range(1, self.old_passes)
        ]
        if others:
            passes = torch.stack([output.logprobs, *others])
            mean = passes.logsumexp(0) - math.log(len(passes))
            output = output._replace(logprobs=mean)
        return output

    def _old_forward(
        self, batch: RolloutBatch, step: int, number: int | None = None
    ) -> ForwardOutput:
        """One pass of the old policy over the rollout; `number` of those after the first."""
        config = self.config
        outputs = []
        for update in range(config.updates_per_rollout):
            for forward in self._forwards(update):
                part = batch.select_prompts(forward.prompts)
                options = ForwardOptions(
                    replay=self.plan.old_pass_record(part.routed_experts),
                    replay_weights=self.plan.gate_weights(part),
                    record=number is None,
                    router_logits=self.reads_routers and number is None,
                    entropy=config.instruments and number is None,
                    noise=self.noise(step, "old", forward.prompts, number),
                    value_head=self.value_head if number is None else None,
                )
                output = self.wrapped.run(response_pass, self.policy, part, options)
                if forward.counts:
                    outputs.append(output)
        return ForwardOutput.concatenate(outputs)

    def gradients(self, experience: Experience, step: int, update: int) -> list[Passed]:
        """Forward and backward passes of one update; gradients are left at the parameters."""
        forwards = self._forwards(update)
        divisor = self._divisor(experience, update)
        passed = []
        for number, forward in enumerate(forwards, 1):
            rows = self._rows(forward.prompts)
            mask = experience.batch.response_mask[rows]
            with self.wrapped.backward(last=number == len(forwards)):
                output = self._forward(experience, forward, step, update)
                output.logprobs.retain_grad()
                inputs = make_inputs(
                    output.logprobs,
                    experience.old_logprobs[rows],
                    experience.advantages[rows],
                    mask if forward.counts else torch.zeros_like(mask),
                    rollout_logprobs=experience.batch.rollout_logprobs[rows],
                    router_shift=self._router_shift(experience, output, rows),
                    values=output.values,
                    old_values=_select(experience.old_values, rows),
                    returns=_select(experience.returns, rows),
                )
                token_losses = self.algorithm.loss(inputs, **self.options)
                loss = aggregate(token_losses, inputs, self._aggregation, divisor=divisor)
                # The ranks' gradients are averaged, and ours are sums.
                (loss * self.ranks.size).backward()
            passed.append(Passed(forward=forward, output=output, loss=loss.item()))
        return passed

    @property
    def old_passes(self) -> int:
        """Passes of the old policy over a rollout."""
        config = self.config
        if config.old_logprobs == "rollout":
            return int(config.routing_replay == "R2" or self.value_head is not None)
        return config.old_passes

    @property
    def _aggregation(self) -> Aggregation:
        return self.config.aggregation or self.algorithm.aggregation

    @property
    def reads_routers(self) -> bool:
        """Whether router logits of the old pass and the updates are needed."""
        return self.config.instruments or self.algorithm.reads_routers

    def _divisor(self, experience: Experience, update: int) -> float:
        """What the loss of the whole update, of all ranks, is divided by."""
        config = self.config
        sequences = config.prompts_per_rollout // config.updates_per_rollout * config.group_size
        if self._aggregation == "sequence_mean":
            return sequences
        if self._aggregation == "fixed_length":
            return sequences * self.max_tokens
        rows = self._rows(self.share.of_update(update))
        return self.ranks.total(float(experience.batch.response_mask[rows].sum()))

    def _router_shift(
        self, experience: Experience, output: ForwardOutput, rows: slice
    ) -> Tensor | None:
        """RSPO's gamma of each response token, for the losses that read it."""
        if not self.algorithm.reads_routers:
            return None
        old, new = experience.old_router_logits, output.router_logits
        assert old is not None and new is not None
        batch = experience.batch
        routes = response_positions(experience.old_routes[rows], batch.prompt_ids.shape[1])
        return shift(old[rows], new.detach(), routes, batch.response_mask[rows])

    def update(self, experience: Experience, step: int, update: int) -> dict[str, Any]:
        """One optimiser update; returns its metrics, of all ranks.

        If the loss or its gradient is NaN or inf, the optimiser takes no step: `skipped` is then 1.
        """
        config = self.config
        with self.clock.timed("updates"), self._training_mode():
            passed = self.gradients(experience, step, update)
        metrics: dict[str, Any] = {"loss": self.ranks.total(sum(part.loss for part in passed))}
        if config.instruments:
            with self.clock.timed("instruments"):
                metrics |= self.observe(experience, passed, step, update)
        with self.clock.timed("updates"):
            norm = clip_gradients(self.parameters, config.max_grad_norm)
            # Both are sums over ranks: all of them decide alike.
            skipped = not (math.isfinite(norm) and math.isfinite(metrics["loss"]))
            if not skipped:
                self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return metrics | {"grad_norm": norm, "skipped": int(skipped)}

    @torch.no_grad()
    def observe(
        self, experience: Experience, passed: list[Passed], step: int, update: int
    ) -> dict[str, Any]:
        """All metrics of one update, taken before the weights move."""
        config, batch = self.config, experience.batch
        every, last = config.attribution_every, update == config.updates_per_rollout - 1
        attribute = bool(last and every and step % every == 0)
        outputs = [part.output.select_sequences(part.forward.counted) for part in passed]
        output = ForwardOutput.concatenate(outputs)
        others = [
            torch.cat(
                [
                    self._forward(experience, part.forward, step, update, plan).logprobs[
                        part.forward.counted
                    ]
                    for part in passed
                ]
            )
            for plan in (self.plan.contrasts if attribute else ())
        ]
        gradients = [
            part.output.logprobs.grad[part.forward.counted]  # type: ignore[index]
            for part in passed
        ]
        rows = self._rows(self.share.of_update(update))
        old_values, returns = experience.old_values, experience.returns
        value_losses = None
        if output.values is not None and old_values is not None and returns is not None:
            value_losses = value_loss(
                output.values, old_values[rows], returns[rows], self.options["value_clip"]
            )
        return instruments.update_metrics(
            output,
            gradient=torch.cat(gradients),
            advantages=experience.advantages[rows],
            mask=batch.response_mask[rows],
            rollout_logprobs=batch.rollout_logprobs[rows],
            old_logprobs=experience.old_logprobs[rows],
            old_routes=experience.old_routes[rows],
            old_router_logits=_select(experience.old_router_logits, rows),
            value_losses=value_losses,
            prompt_length=batch.prompt_ids.shape[1],
            other_logprobs=others,
            replayed=self.plan.is_on,
            per_position=attribute,
            gather=self.ranks.gather,
        )

    def noise(
        self, step: int, kind: NoisyPass, prompts: slice, number: int | None = None
    ) -> RouterNoise | None:
        """The router noise of one pass over some of this rank's prompts; None: it draws none.

        `number` tells passes of one kind within a rollout step apart.
        """
        config = self.config
        if config.router_noise == 0.0 or config.router_noise_passes not in ("all", kind):
            return None
        return RouterNoise(
            std=self.config.router_noise,
            seed=self.config.seed,
            step=step,
            purpose=kind if number is None else f"{kind}{number}",
            prompts=self.share.prompts[prompts],
            group_size=self.config.group_size,
        )

    def _forward(
        self,
        experience: Experience,
        forward: Forward,
        step: int,
        update: int,
        contrast: ReplayPlan | None = None,
    ) -> ForwardOutput:
        """The current policy over some prompts; a `contrast` replays by another plan."""
        rows, plan = self._rows(forward.prompts), contrast or self.plan
        part = experience.batch.select_prompts(forward.prompts)
        options = ForwardOptions(
            replay=experience.replay[rows] if plan.is_on else None,
            replay_weights=plan.gate_weights(part),
            record=self.config.instruments and contrast is None,
            router_logits=self.reads_routers and contrast is None,
            noise=self.noise(step, "update", forward.prompts, update),
            value_head=self.value_head if contrast is None else None,
        )
        return self.wrapped.run(response_pass, self.policy, part, options)

    def _forwards(self, update: int) -> list[Forward]:
        """The forward passes that an update is cut into, equally many on all ranks."""
        own, most = self.share.of_update(update), self.share.most_of_update(update)
        size = self.config.prompts_per_forward or most
        found = [
            Forward(prompts=slice(start, min(start + size, own.stop)))
            for start in range(own.start, own.stop, size)
        ]
        spare = Forward(prompts=slice(0, 1), counts=False)
        return found + [spare] * (math.ceil(most / size) - len(found))

    def _rows(self, prompts: slice) -> slice:
        return slice(prompts.start * self.config.group_size, prompts.stop * self.config.group_size)

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


def _select(values: Tensor | None, rows: slice) -> Tensor | None:
    return None if values is None else values[rows]
