"""The training loop: rollout -> old log-probs and routes -> m minibatch updates -> metrics.

Every random draw is a pure function of (run seed, step, prompt, sample, purpose), so a run is
decided by its config alone. Minibatches are consecutive whole groups: prompts are drawn
independently, so no shuffling is needed.
"""

import dataclasses
import json
import math
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from moe_rl import instruments
from moe_rl.advantages import group_advantages
from moe_rl.checkpoints import Checkpoint, Checkpoints
from moe_rl.config import ConfigError, RunConfig
from moe_rl.experience import Experience
from moe_rl.losses import LossOutput, loss_function
from moe_rl.policy import Policy
from moe_rl.process import prepare_process
from moe_rl.response_pass import Pass, PassOutput, response_pass
from moe_rl.rollout.batch import RolloutBatch
from moe_rl.rollout.noise import RouterNoise
from moe_rl.rollout.sampling import sample_responses
from moe_rl.rollout.score import score
from moe_rl.run_state import (
    POLICY,
    BegunStep,
    Progress,
    load_log_sizes,
    load_state,
    save_state,
)
from moe_rl.runlog import RunLog, check_run_folder
from moe_rl.seeding import generator
from moe_rl.start import clip_range, saved_policy, starting_policy
from moe_rl.tasks import make_task

StepCallback = Callable[[dict[str, Any]], None]


class Trainer:
    """Trains one policy on one task under one config, writing one run folder.

    Args:
        config: the run.
        policy: trained in place.
        log: of the run folder.
        checkpoints: where `config.checkpoint_every` has it write them; None: nowhere.
    """

    def __init__(
        self,
        config: RunConfig,
        policy: Policy,
        log: RunLog,
        checkpoints: Checkpoints | None = None,
    ) -> None:
        self.config, self.policy, self.log, self.checkpoints = config, policy, log, checkpoints
        self.progress = Progress()
        self.task = make_task(config.task.task, **config.task.options())
        self.clip = clip_range(config)
        self.loss = loss_function(config.algorithm)
        self.seconds: dict[str, float] = defaultdict(float)
        if config.freeze_router:
            policy.freeze_routers()
        if config.gradient_checkpointing:
            model = policy.model
            # transformers >= 5.2x renames it; the old name warns there.
            enable = getattr(model, "activation_checkpointing_enable", None)
            (enable or model.gradient_checkpointing_enable)()
        self.parameters = [p for p in policy.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def go_on_from(self, checkpoint: Checkpoint) -> None:
        """Stand where a checkpoint was written; the policy is loaded from it already."""
        self.progress = load_state(checkpoint.path, self.policy, self.optimizer)
        self.seconds.update(self.progress.seconds)

    def run(self, on_step: StepCallback | None = None) -> dict[str, Any]:
        """Train from where the run stands to the end and return the summary."""
        rewards = self.progress.rewards
        for step in range(self.progress.step, self.config.steps):
            begun = self.progress.begun
            if begun is None:
                self.progress = Progress(
                    step=step, rewards=rewards, seconds_before={**self.seconds}
                )
            metrics = {"step": step, **self.step(step, begun)}
            before = self.progress.seconds_before
            spent = {k: self.seconds[k] - before.get(k, 0.0) for k in self.seconds}
            metrics |= {f"seconds_{k}": v for k, v in spent.items() if k != "step"}
            metrics["seconds"] = spent["step"]
            rewards.append(metrics["reward"])
            self.log.step(metrics)
            if self.config.save_every and (step + 1) % self.config.save_every == 0:
                self.save(f"policy_{step + 1:05d}")
            self.progress = Progress(step=step + 1, rewards=rewards)
            self._checkpoint_if_due(None)
            if on_step is not None:
                on_step(metrics)
        if self.config.save_every and self.config.steps % self.config.save_every:
            self.save(f"policy_{self.config.steps:05d}")
        summary = self._summary(rewards)
        self.log.finish(summary)
        return summary

    def step(self, step: int, begun: BegunStep | None = None) -> dict[str, Any]:
        """One rollout and its updates; writes the update lines, returns the step line.

        `begun` is what an interrupted run had of this step: its rollout, and updates made.
        """
        with self._timed("step"):
            rate = learning_rate(self.config, step)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            if begun is None:
                try:
                    experience, metrics = self.experience(step)
                except FloatingPointError as error:
                    raise FloatingPointError(
                        f"rollout step {step}: {error}; the run has diverged at "
                        f"learning_rate={self.config.learning_rate:g}, take a smaller one"
                    ) from error
            else:
                experience, metrics = begun.experience, begun.metrics
            per_update = self.config.prompts_per_rollout // self.config.updates_per_rollout
            for update in range(begun.update if begun else 0, self.config.updates_per_rollout):
                prompts = slice(update * per_update, (update + 1) * per_update)
                values = self.update(experience, prompts, step, update)
                self.log.update({"step": step, "update": update, "learning_rate": rate, **values})
                if update + 1 < self.config.updates_per_rollout:
                    self._checkpoint_if_due(
                        BegunStep(update=update + 1, experience=experience, metrics=metrics)
                    )
        return {"learning_rate": rate, **metrics}

    def experience(self, step: int) -> tuple[Experience, dict[str, Any]]:
        """Sample, score, and run the old policy over one rollout."""
        config = self.config
        with self._timed("rollout"):
            problems = [
                self.task.prompts(generator(config.seed, "prompts", step=step, prompt=p), 1)[0]
                for p in range(config.prompts_per_rollout)
            ]
            batch = sample_responses(
                self.policy,
                self.task,
                problems,
                seed=config.seed,
                purpose="sample",
                step=step,
                group_size=config.group_size,
                noise=self._noise(step, "rollout", slice(0, config.prompts_per_rollout)),
                scores=config.instruments and config.old_logprobs == "rollout",
            )
            rewards = score(self.policy, self.task, problems, batch.response_ids)
            advantages = group_advantages(rewards).flatten().to(self.policy.device)
        with self._timed("old_logprobs"):
            old = self.old_pass(batch, step)
        assert old.routed_experts is not None
        replay = old.routed_experts
        if config.routing_replay == "R3":
            assert batch.routed_experts is not None
            replay = batch.routed_experts
        metrics: dict[str, Any] = {
            "reward": rewards.mean().item(),
            "reward_std": rewards.std().item(),
            "zero_std_groups": (rewards.std(dim=1) == 0).float().mean().item(),
            "response_length": batch.response_mask.sum(1).float().mean().item(),
            "truncated": batch.truncated.float().mean().item(),
        }
        if config.instruments:
            with self._timed("instruments"):
                metrics |= instruments.rollout_metrics(batch, old)
                if config.old_logprobs == "trainer":
                    metrics |= instruments.mismatch_metrics(batch, old)
        experience = Experience(
            batch=batch,
            advantages=advantages,
            old_logprobs=old.logprobs,
            old_routes=old.routed_experts,
            old_scores=old.router_logits,
            replay=replay,
        )
        return experience, metrics

    @torch.no_grad()
    def old_pass(self, batch: RolloutBatch, step: int) -> PassOutput:
        """The old policy over the rollout, in the very batches that the updates will use.

        Equal shapes make the first update's ratios 1 up to rounding. Straight from the engine where
        `old_logprobs` says so.
        """
        config = self.config
        if config.old_logprobs == "rollout":
            return PassOutput(
                logprobs=batch.rollout_logprobs,
                entropy=None,
                routed_experts=batch.routed_experts,
                router_logits=batch.router_logits,
            )
        outputs = []
        for prompts in self._forward_slices(slice(0, config.prompts_per_rollout)):
            part = batch.select(prompts)
            options = Pass(
                replay=part.routed_experts if config.routing_replay == "R3" else None,
                scores=config.instruments,
                entropy=config.instruments,
                noise=self._noise(step, "old", prompts),
            )
            outputs.append(response_pass(self.policy, part, options))
        return PassOutput.concatenate(outputs)

    def update(
        self, experience: Experience, prompts: slice, step: int, update: int
    ) -> dict[str, Any]:
        """One optimiser update on a range of prompts; returns its metrics."""
        config = self.config
        last = update == config.updates_per_rollout - 1
        every = config.attribution_every
        attribute = bool(config.instruments and last and every and step % every == 0)
        sequences = (prompts.stop - prompts.start) * config.group_size
        parts: list[tuple[slice, PassOutput, LossOutput]] = []
        with self._timed("updates"), self._training_mode():
            for part in self._forward_slices(prompts):
                output = self._forward(experience, part, step, f"update{update}")
                rows = self._rows(part)
                loss = self.loss(
                    output.logprobs,
                    experience.old_logprobs[rows],
                    experience.advantages[rows],
                    experience.batch.response_mask[rows],
                    clip_low=self.clip[0],
                    clip_high=self.clip[1],
                    num_sequences=sequences,
                )
                loss.loss.backward()
                parts.append((part, output, loss))
        metrics: dict[str, Any] = {"loss": sum(loss.loss.item() for _, _, loss in parts)}
        if config.instruments:
            with self._timed("instruments"):
                metrics |= self._observe(experience, prompts, parts, attribute, step, update)
        with self._timed("updates"):
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, config.max_grad_norm).item()
            # A step along a non-finite gradient would end the run, and a study that loses its
            # worst runs flatters the arm that made them.
            skipped = not math.isfinite(norm)
            if not skipped:
                self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return metrics | {"grad_norm": norm, "skipped": int(skipped)}

    def _forward(
        self, experience: Experience, prompts: slice, step: int, purpose: str, flip: bool = False
    ) -> PassOutput:
        """The current policy over some prompts; `flip` turns replay on where it is off."""
        rows = self._rows(prompts)
        replayed = (self.config.routing_replay != "disabled") != flip
        return response_pass(
            self.policy,
            experience.batch.select(prompts),
            Pass(
                replay=experience.replay[rows] if replayed else None,
                record=self.config.instruments and not flip,
                scores=self.config.instruments and not flip,
                noise=self._noise(step, purpose, prompts),
            ),
        )

    @torch.no_grad()
    def _observe(
        self,
        experience: Experience,
        prompts: slice,
        parts: list[tuple[slice, PassOutput, LossOutput]],
        attribute: bool,
        step: int,
        update: int,
    ) -> dict[str, Any]:
        """All metrics of one update, taken before the weights move."""
        rows = self._rows(prompts)
        batch = experience.batch
        output = PassOutput.concatenate([output for _, output, _ in parts])
        other = None
        if attribute:
            flipped = [
                self._forward(experience, part, step, f"update{update}", flip=True).logprobs
                for part, _, _ in parts
            ]
            other = torch.cat(flipped)
        return instruments.update_metrics(
            output,
            clipped_low=torch.cat([loss.clipped_low for _, _, loss in parts]),
            clipped_high=torch.cat([loss.clipped_high for _, _, loss in parts]),
            mask=batch.response_mask[rows],
            old_logprobs=experience.old_logprobs[rows],
            old_routes=experience.old_routes[rows],
            old_scores=None if experience.old_scores is None else experience.old_scores[rows],
            prompt_length=batch.prompt_ids.shape[1],
            other_logprobs=other,
            replayed=self.config.routing_replay != "disabled",
            per_position=attribute,
        )

    def _forward_slices(self, prompts: slice) -> Iterator[slice]:
        """The forward passes that a range of prompts is cut into."""
        config = self.config
        size = (
            config.prompts_per_forward or config.prompts_per_rollout // config.updates_per_rollout
        )
        for start in range(prompts.start, prompts.stop, size):
            yield slice(start, start + size)

    def _rows(self, prompts: slice) -> slice:
        return slice(prompts.start * self.config.group_size, prompts.stop * self.config.group_size)

    def _noise(self, step: int, purpose: str, prompts: slice) -> RouterNoise | None:
        if self.config.router_noise == 0.0:
            return None
        return RouterNoise(
            std=self.config.router_noise,
            seed=self.config.seed,
            step=step,
            purpose=purpose,
            prompts=range(prompts.start, prompts.stop),
            group_size=self.config.group_size,
        )

    @contextmanager
    def _training_mode(self) -> Iterator[None]:
        """Training mode where activations are recomputed: transformers recomputes only then.

        Elsewhere the model stays in evaluation mode, as checkpointing would take its cache away
        while it samples.
        """
        self.policy.model.train(self.config.gradient_checkpointing)
        try:
            yield
        finally:
            self.policy.model.eval()

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        if self.policy.device.type == "cuda":
            torch.cuda.synchronize(self.policy.device)
        start = time.perf_counter()
        yield
        if self.policy.device.type == "cuda":
            torch.cuda.synchronize(self.policy.device)
        self.seconds[name] += time.perf_counter() - start

    def _checkpoint_if_due(self, begun: BegunStep | None) -> None:
        """Write a checkpoint after every n-th update; `begun` is the step under way, if one is."""
        per_step, every = self.config.updates_per_rollout, self.config.checkpoint_every
        made = self.progress.step * per_step + (begun.update if begun else 0)
        if self.checkpoints is None or not every or made % every:
            return
        progress = dataclasses.replace(self.progress, begun=begun, seconds={**self.seconds})
        rewards = progress.rewards
        self.checkpoints.write(
            progress.step,
            begun.update if begun else 0,
            lambda path: save_state(path, progress, self.policy, self.optimizer, self.log.sizes()),
            score=rewards[-1] if rewards else 0.0,
        )

    def save(self, name: str) -> None:
        """Save the policy as a Hugging Face checkpoint folder inside the run folder."""
        self.policy.model.save_pretrained(self.log.folder / name)
        self.policy.tokenizer.save_pretrained(self.log.folder / name)

    def _summary(self, rewards: list[float]) -> dict[str, Any]:
        tail = rewards[-max(1, len(rewards) // 8) :]
        model = self.policy.model
        return {
            "steps": len(rewards),
            "final_reward": sum(tail) / len(tail),
            "seconds": self.seconds["step"],
            **{f"seconds_{k}": v for k, v in self.seconds.items() if k != "step"},
            "instruments_share": self.seconds["instruments"] / self.seconds["step"],
            "parameters": sum(p.numel() for p in model.parameters()),
            "active_parameters": self.policy.active_parameters,
            "experts": self.policy.experts,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "threads": torch.get_num_threads(),
        }


def learning_rate(config: RunConfig, step: int) -> float:
    """Learning rate of a rollout step: linear warm-up, then constant or linear to 0 at the end."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    decay = 1 - step / config.steps if config.learning_rate_schedule == "linear" else 1.0
    return config.learning_rate * warm * decay


def train(
    config: RunConfig,
    folder: Path,
    *,
    cold_start_cache: Path,
    resume: bool = False,
    on_step: StepCallback | None = None,
    on_cold_start: Callable[[int, float], None] | None = None,
    on_damage: Callable[[str], None] = warnings.warn,
) -> dict[str, Any]:
    """Run `config` into `folder`, from its cold start or from a checkpoint; returns the summary.

    Args:
        config: the run.
        folder: its run folder.
        cold_start_cache: folder of all cold starts.
        resume: go on from the newest whole checkpoint in the folder, from the start if there is
            none. The rest of the run is bitwise that of one which was never interrupted.
        on_step: called with the metrics of each rollout step.
        on_cold_start: called with (supervised step, loss).
        on_damage: told about each checkpoint that had to be passed over.

    Raises:
        ConfigError: the folder holds another run, or checkpoints of this one without `resume`; or
            the policy cannot be built.
        ValueError: a clip range of the other algorithm's scale.
    """
    config = config.named()
    clip_range(config)  # refused here, before a cold start is trained
    prepare_process(config.num_threads)
    check_run_folder(folder, config)
    identity = json.dumps(config.to_dict(), sort_keys=True)
    checkpoints = Checkpoints(folder / "checkpoints", identity=identity)
    checkpoint = checkpoints.newest(on_damage if resume else _refuse_to_start_over)
    if checkpoint is not None and not resume:
        _refuse_to_start_over(str(checkpoint.path))
    # Before anything is written: a folder of a run that could not start would be in the way.
    if checkpoint is None:
        policy = starting_policy(config, cold_start_cache, on_cold_start)
        log = RunLog(folder, config)
    else:
        policy = saved_policy(config, checkpoint.path / POLICY)
        log = RunLog(folder, config, sizes=load_log_sizes(checkpoint.path))
    try:
        trainer = Trainer(config, policy, log, checkpoints)
        if checkpoint is not None:
            trainer.go_on_from(checkpoint)
        return trainer.run(on_step)
    finally:
        log.close()


def _refuse_to_start_over(found: str) -> None:
    raise ConfigError(
        f"{found}: a checkpoint of this run; add --resume to go on from it, or give another folder"
    )
