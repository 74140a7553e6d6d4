"""The training loop: rollout -> old log-probs and routes -> m minibatch updates -> metrics.

Every random draw is a pure function of (run seed, step, prompt, sample, purpose), so a run is
decided by its config alone. Minibatches are consecutive whole groups: prompts are drawn
independently, so no shuffling is needed.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from torch import Tensor

from moe_rl.batch import Experience, RolloutBatch, response_positions
from moe_rl.config import RunConfig
from moe_rl.losses.advantages import gae, group_advantages, whiten
from moe_rl.metrics import instruments
from moe_rl.policy.forward import choose_layout
from moe_rl.policy.policy import Policy
from moe_rl.recorded import RecordedBatch, write_batch
from moe_rl.rollout.engine import describe_numerics, make_engine
from moe_rl.rollout.request import Request
from moe_rl.rollout.rewards import score_responses
from moe_rl.run_folder.checkpoints import Checkpoints
from moe_rl.run_folder.log import NoLog, RunLog
from moe_rl.run_folder.sealing import write_sealed
from moe_rl.runtime.process import cpu_name
from moe_rl.runtime.ranks import Ranks
from moe_rl.runtime.seeding import generator
from moe_rl.runtime.stopping import Stopped, StopRequest
from moe_rl.runtime.stopwatch import Stopwatch
from moe_rl.runtime.wrapped import Parallelism
from moe_rl.tasks import Task
from moe_rl.training.crash import Crash, NonFinite, collect_experience
from moe_rl.training.evaluation import evaluate_policy
from moe_rl.training.learner import Learner
from moe_rl.training.state import (
    POLICY,
    Progress,
    collect_policy,
    collect_state,
    load_masters,
    load_optimizer,
    load_progress,
    load_value_head,
)

StepCallback = Callable[[dict[str, Any]], None]


class Trainer:
    """Trains one policy on one task under one config, writing one run folder.

    Args:
        config: the run.
        policy: trained in place.
        task: gives the prompts and judges the responses.
        log: of the run folder; only the main rank writes.
        checkpoints: where they go; None: there are none.
        ranks: processes that train together; alone by default.
        parallelism: how they share the policy.
        stop: whether a signal has asked the run to end.
    """

    def __init__(
        self,
        config: RunConfig,
        policy: Policy,
        task: Task,
        log: RunLog | NoLog,
        checkpoints: Checkpoints | None = None,
        *,
        ranks: Ranks | None = None,
        parallelism: Parallelism = "ddp",
        stop: StopRequest | None = None,
    ) -> None:
        self.config, self.policy, self.task = config, policy, task
        self.log, self.checkpoints = log, checkpoints
        self.ranks, self.stop = ranks or Ranks(), stop or StopRequest()
        self.progress = Progress()
        self.engine = make_engine(config.engine, policy, config.rollout_precision)
        self.clock = Stopwatch(policy.device)
        self.learner = Learner(
            config,
            policy,
            self.clock,
            self.ranks,
            parallelism,
            max_tokens=task.max_response_tokens,
        )

    def resume_from(self, checkpoint: Path) -> None:
        """Stand where a checkpoint was written; the policy is loaded from it already."""
        load_masters(checkpoint / POLICY, self.learner)
        load_value_head(checkpoint / POLICY, self.learner)
        load_optimizer(checkpoint, self.learner)
        self.progress = load_progress(checkpoint)
        self.clock.seconds.update(self.progress.seconds)

    def run(self, on_step: StepCallback | None = None) -> dict[str, Any]:
        """Train from where the run stands to the end and return the summary.

        Raises:
            NonFinite: a loss, a gradient or the policy's logits are NaN or inf (see
                `on_nonfinite`); nothing was learnt from them.
            Stopped: a signal has come; the checkpoint is written.
        """
        config, rewards = self.config, self.progress.rewards
        for step in range(self.progress.step, config.steps):
            before = self.clock.seconds.copy()
            metrics = {"step": step, **self.step(step), **self._seconds_since(before)}
            rewards.append(metrics["reward"])
            self.log.step(metrics)
            if config.save_every and (step + 1) % config.save_every == 0:
                self.save(f"policy_{step + 1:05d}")
            if on_step is not None:
                on_step(metrics)
            seconds = dict(self.clock.seconds)
            self.progress = Progress(step=step + 1, rewards=rewards, seconds=seconds)
            self._between_steps()
        if config.save_every and config.steps % config.save_every:
            self.save(f"policy_{config.steps:05d}")
        summary = self._summary(rewards)
        self.log.finish(summary)
        return summary

    def step(self, step: int) -> dict[str, Any]:
        """One rollout and its updates; writes the update lines, returns the step line."""
        with self.clock.timed("step"):
            rate = learning_rate(self.config, step)
            self.learner.set_learning_rate(rate)
            try:
                experience, metrics = self.experience(step)
            except FloatingPointError as error:
                self._crash(step, 0, None, str(error), {"step": step})
            recorded = self.config.record_every and (step + 1) % self.config.record_every == 0
            if recorded:
                self.learner.seen_logprobs = torch.zeros_like(experience.old_logprobs)
            for update in range(self.config.updates_per_rollout):
                values = self.learner.update(experience, step, update)
                line = {"step": step, "update": update, "learning_rate": rate, **values}
                self.log.update(line)
                if values["skipped"] and self.config.on_nonfinite == "stop":
                    reason = "the loss or its gradient is NaN or inf"
                    self._crash(step, update, experience, reason, line)
            if recorded:
                self._record(step, experience)
        every = self.config.evaluate_every
        if every and (step + 1) % every == 0:
            try:
                with self.clock.timed("evaluation"), self.learner.wrapped.unsharded():
                    found = evaluate_policy(self.policy, self.task, self.config, step, self.ranks)
            except FloatingPointError as error:
                reason = f"held-out evaluation: {error}"
                self._crash(step, self.config.updates_per_rollout, None, reason, {"step": step})
            metrics |= found
        return {"learning_rate": rate, **metrics}

    def _record(self, step: int, experience: Experience) -> None:
        """Write a rollout's batch as its updates saw it; of several processes the main one's."""
        logprobs, self.learner.seen_logprobs = self.learner.seen_logprobs, None
        if not self.ranks.main:
            return
        batch, advantages = experience.batch, experience.advantages
        width = batch.prompt_ids.shape[1]
        if advantages.ndim == 1:
            advantages = advantages[:, None].expand_as(batch.response_mask)
        folder = self.log.folder / "batches"
        folder.mkdir(exist_ok=True)
        write_batch(
            folder / f"step_{step:05d}.safetensors",
            RecordedBatch(
                source="moe-rl",
                mask=batch.response_mask,
                logprobs=logprobs,
                old_logprobs=experience.old_logprobs,
                rollout_logprobs=batch.rollout_logprobs,
                advantages=advantages,
                routes=response_positions(batch.routed_experts, width),
                trainer_routes=response_positions(experience.old_routes, width),
            ),
        )

    def experience(self, step: int) -> tuple[Experience, dict[str, Any]]:
        """Sample, score, and run the old policy over one rollout.

        Raises:
            FloatingPointError: the policy's logits are NaN or inf.
        """
        config, gather = self.config, self.ranks.gather
        with self.clock.timed("rollout"):
            batch, rewards, advantages = self._rollout(step)
        with self.clock.timed("old_logprobs"):
            old = self.learner.passes.old_pass(batch, step)
        assert old.routed_experts is not None
        scored = {"rewards": rewards.flatten().to(self.policy.device), "truncated": batch.truncated}
        scored |= {"mask": batch.response_mask}
        returns = None
        if old.values is not None:
            raw = gae(scored["rewards"], old.values, batch.response_mask, lam=config.gae_lambda)
            returns = raw + old.values
            advantages = whiten(raw, batch.response_mask, total=self.ranks.total)
        metrics = _rollout_metrics(**gather(scored), group_size=config.group_size)
        metrics["operations"] = self._operations(batch)
        if config.instruments:
            with self.clock.timed("instruments"):
                by_logits = self.learner.by_logits
                metrics |= instruments.rollout_metrics(
                    batch, old, by_logits=by_logits, gather=gather
                )
                if config.old_logprobs == "trainer":
                    metrics |= instruments.mismatch_metrics(batch, old, gather=gather)
                if old.values is not None:
                    metrics |= instruments.value_metrics(
                        batch, old.values, scored["rewards"], gather=gather
                    )
        experience = Experience(
            batch=batch,
            advantages=advantages,
            old_logprobs=old.logprobs,
            old_routes=old.routed_experts,
            old_router_logits=old.router_logits,
            replay=self.learner.plan.update_record(batch.routed_experts, old.routed_experts),
            old_values=old.values,
            returns=returns,
        )
        return experience, metrics

    def _rollout(self, step: int) -> tuple[RolloutBatch, Tensor, Tensor]:
        """This rank's responses, their rewards float32 [P, G] and advantages float32 [B]."""
        config, prompts = self.config, self.learner.share.prompts
        problems = [
            self.task.prompts(generator(config.seed, "prompts", step=step, prompt=p), 1)[0]
            for p in prompts
        ]

        request = Request(
            prompts=[problem.prompt for problem in problems],
            numbers=prompts,
            seed=config.seed,
            purpose="sample",
            step=step,
            group_size=config.group_size,
            max_tokens=self.task.max_response_tokens,
            noise=self.learner.passes.noise(step, "rollout", slice(0, len(prompts))),
            router_logits=self.learner.passes.reads_routers and config.old_logprobs == "rollout",
            gate_weights=self.learner.plan.replays_weights,
        )
        with self.ranks.finite_together(), torch.no_grad(), self.learner.wrapped.unsharded():
            batch = self.learner.wrapped.run(self.engine.sample, request)
            rewards = score_responses(
                self.policy, self.task, problems, batch.response_ids, step=step, numbers=prompts
            )
            scale = self.learner.algorithm.scale_advantages
            advantages = group_advantages(rewards, scale=scale).flatten().to(self.policy.device)
        # Of one length on all ranks: what they tell each other, and a crash bundle, is one table.
        longest = (batch.prompt_ids.shape[1], batch.response_ids.shape[1])
        lengths = [self.ranks.largest(length) for length in longest]
        return batch.padded(*lengths, pad_id=self.policy.pad_id), rewards, advantages

    def _operations(self, batch: RolloutBatch) -> float:
        """Floating-point operations of a rollout step, of all ranks, by the usual estimate.

        2 a parameter that a token passes through and read, 6 where its gradient is taken. Prompts
        are read once a group. What instruments take does not count, nor a pass made for router
        logits alone, nor what gradient checkpointing makes again.
        """
        tokens = self.ranks.total(float(batch.prompt_mask.sum() + batch.response_mask.sum()))
        return 2.0 * self.policy.active_parameters * tokens * (4 + self.learner.passes.old_passes)

    def _crash(
        self,
        step: int,
        update: int,
        experience: Experience | None,
        reason: str,
        metrics: dict[str, Any],
    ) -> NoReturn:
        """Leave behind what it takes to see it again, and end the run; all ranks call this."""
        crash = Crash(
            folder=self.log.folder,
            config=self.config,
            step=step,
            update=update,
            reason=reason,
            metrics=metrics,
        )
        policy, rollout = collect_policy(self.learner), collect_experience(experience, self.learner)
        with self.ranks.together():
            if self.ranks.main:
                crash.write(policy, rollout, processes=self.ranks.size)
        raise NonFinite(crash)

    def _seconds_since(self, before: dict[str, float]) -> dict[str, float]:
        """What the step that has ended took, by purpose."""
        seconds = self.clock.seconds
        spent = {name: seconds[name] - before.get(name, 0.0) for name in seconds}
        parts = {f"seconds_{name}": value for name, value in spent.items() if name != "step"}
        return parts | {"seconds": spent["step"]}

    def _between_steps(self) -> None:
        """Checkpoint if one is due, and stop if a signal has come.

        Raises:
            Stopped: a signal has come to any rank.
        """
        step, every = self.progress.step, self.config.checkpoint_every
        stop = self.ranks.largest(self.stop.number)
        if step == self.config.steps:
            stop = 0  # only the summary is left to write
        if self.checkpoints is None or not (stop or (every and step % every == 0)):
            return
        fill = collect_state(self.progress, self.learner)
        with self.ranks.together():
            if self.ranks.main:
                self.log.flush()
                self.checkpoints.write(step, fill, reward=self.progress.rewards[-1])
        if stop:
            raise Stopped(stop, self.checkpoints.path(step))

    def save(self, name: str) -> None:
        """Save the policy as a Hugging Face checkpoint folder inside the run folder.

        It is there whole or not at all: other runs of a study wait for it and start from it.
        """
        fill = collect_policy(self.learner)
        with self.ranks.together():
            if self.ranks.main:
                write_sealed(self.log.folder / name, fill, about={})

    def _summary(self, rewards: list[float]) -> dict[str, Any]:
        tail = rewards[-max(1, len(rewards) // 8) :]
        seconds = self.clock.seconds
        return {
            "steps": len(rewards),
            "final_reward": sum(tail) / len(tail),
            "seconds": seconds["step"],
            **{f"seconds_{k}": v for k, v in seconds.items() if k != "step"},
            "instruments_share": seconds["instruments"] / seconds["step"],
            "parameters": sum(p.numel() for p in self.policy.model.parameters()),
            "active_parameters": self.policy.active_parameters,
            "experts": self.policy.experts,
            "layout": choose_layout(self.policy),
            "rollout_numerics": describe_numerics(
                self.config.engine, self.config.rollout_precision, self.policy.model.dtype
            ),
            "processor": cpu_name(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "threads": torch.get_num_threads(),
            "processes": self.ranks.size,
        }


def _rollout_metrics(
    rewards: Tensor, truncated: Tensor, mask: Tensor, group_size: int
) -> dict[str, Any]:
    """Of rewards [B], group after group, truncated [B] and the response mask [B, T]."""
    rewards = rewards.unflatten(0, (-1, group_size))
    return {
        "reward": rewards.mean().item(),
        "reward_std": rewards.std().item(),
        # Not by their standard deviation, which is rounded: that of three times 0.9 is not 0.
        "zero_std_groups": (rewards.amax(1) == rewards.amin(1)).float().mean().item(),
        "response_length": mask.sum(1).float().mean().item(),
        "truncated": truncated.float().mean().item(),
    }


def learning_rate(config: RunConfig, step: int) -> float:
    """Learning rate of a rollout step: base * min(1, (step + 1) / warmup_steps), and for `linear`
    times 1 - step / steps, so that a short run never reaches its base.
    """
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    decay = 1 - step / config.steps if config.learning_rate_schedule == "linear" else 1.0
    return config.learning_rate * warm * decay
