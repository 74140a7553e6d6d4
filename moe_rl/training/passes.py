"""The forward passes of a rollout on this rank: of the old policy, and of each update.

A rank holds some prompts of each update (see `share.py`); an update is cut into forward
passes, and each pass replays, records and draws noise as the config says.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from moe_rl.batch import Experience, RolloutBatch
from moe_rl.config import RunConfig
from moe_rl.policy.forward import ForwardOptions, ForwardOutput, response_pass
from moe_rl.policy.pass_noise import PassNoise
from moe_rl.policy.policy import Policy
from moe_rl.runtime.wrapped import Wrapped
from moe_rl.training.replay_plan import ReplayPlan
from moe_rl.training.share import Share
from moe_rl.training.value_head import ValueHead

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
class Passes:
    """How this rank's passes over a rollout are made."""

    config: RunConfig
    policy: Policy
    wrapped: Wrapped
    share: Share
    plan: ReplayPlan
    value_head: ValueHead | None
    reads_routers: bool
    """Whether router logits of the old pass and the updates are needed."""

    @property
    def old_passes(self) -> int:
        """Passes of the old policy over a rollout."""
        config = self.config
        if config.old_logprobs == "rollout":
            return int(config.routing_replay == "R2" or self.value_head is not None)
        return config.old_passes

    @property
    def can_be_split(self) -> bool:
        """Whether old log-probs are under the very routes that the contrasts of the split replay.

        A mean over passes has no routes; and where the engine gives old log-probs and a pass of the
        trainer the routes, the two are of different passes.
        """
        if self.plan.replays_engine:
            return self.old_passes <= 1
        return self.old_passes == int(self.config.old_logprobs == "trainer")

    @torch.no_grad()
    def old_pass(self, batch: RolloutBatch, step: int) -> ForwardOutput:
        """The old policy over the rollout, in the very batches that the updates will use.

        Equal shapes make the first update's ratios 1 up to rounding. Where `old_logprobs` says so,
        the log-probs are the engine's, and a pass is made only for routes that R2 replays, for
        values, or for router logits that are read and that the engine does not return.
        """
        from_engine = self.config.old_logprobs == "rollout"
        if self.old_passes == 0:
            from_batch = ForwardOutput(
                logprobs=batch.rollout_logprobs,
                entropy=None,
                routed_experts=batch.routed_experts,
                router_logits=batch.router_logits,
            )
            if not self.reads_routers or batch.router_logits is not None:
                return from_batch
            seen = self._old_forward(batch, step)
            return from_batch._replace(router_logits=seen.router_logits, entropy=seen.entropy)
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
            for forward in self.of_update(update):
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

    def noise(
        self, step: int, kind: NoisyPass, prompts: slice, number: int | None = None
    ) -> PassNoise | None:
        """The noise of one pass over some of this rank's prompts; None: it draws none.

        `number` tells passes of one kind within a rollout step apart.
        """
        config = self.config
        is_noisy = config.router_noise > 0 or config.hidden_noise > 0
        if not is_noisy or config.router_noise_passes not in ("all", kind):
            return None
        return PassNoise(
            std=config.router_noise,
            hidden_std=config.hidden_noise,
            seed=config.seed,
            step=step,
            purpose=kind if number is None else f"{kind}{number}",
            prompts=self.share.prompts[prompts],
            group_size=config.group_size,
        )

    def update_pass(
        self,
        part: Experience,
        forward: Forward,
        step: int,
        update: int,
        contrast: ReplayPlan | None = None,
    ) -> ForwardOutput:
        """The current policy over the prompts of `forward`, and a rollout's `part` of them.

        A `contrast` replays by another plan than the run's.
        """
        plan = contrast or self.plan
        options = ForwardOptions(
            replay=part.replay if plan.is_on else None,
            replay_weights=plan.gate_weights(part.batch),
            record=self.config.instruments and contrast is None,
            router_logits=self.reads_routers and contrast is None,
            noise=self.noise(step, "update", forward.prompts, update),
            value_head=self.value_head if contrast is None else None,
        )
        return self.wrapped.run(response_pass, self.policy, part.batch, options)

    def of_update(self, update: int) -> list[Forward]:
        """The forward passes that an update is cut into, equally many on all ranks."""
        own, most = self.share.of_update(update), self.share.most_of_update(update)
        size = self.config.prompts_per_forward or most
        found = [
            Forward(prompts=slice(start, min(start + size, own.stop)))
            for start in range(own.start, own.stop, size)
        ]
        spare = Forward(prompts=slice(0, 1), counts=False)
        return found + [spare] * (math.ceil(most / size) - len(found))

    def rows(self, prompts: slice) -> slice:
        """The sequences of some prompts."""
        return slice(prompts.start * self.config.group_size, prompts.stop * self.config.group_size)
