"""Redo the update that met NaN or inf, from its crash bundle, and find where they first appear.

Forward and backward run as they did, without the optimiser's step. What is looked at is every
module's output, every response token's log-prob and ratio, the loss, and every gradient.
"""

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_rl.batch import Experience
from moe_rl.config import ConfigError, load_config
from moe_rl.run_folder.log import NoLog
from moe_rl.run_folder.sealing import Damaged, read_sealed
from moe_rl.runtime.process import prepare_process
from moe_rl.tasks import task_of
from moe_rl.training.cold_start import saved_policy
from moe_rl.training.crash import CONFIG, CRASH, load_experience
from moe_rl.training.evaluation import evaluate_policy
from moe_rl.training.learner import Learner, Passed
from moe_rl.training.state import POLICY, load_value_head
from moe_rl.training.trainer import Trainer

_SHOWN = 5  # names of weights or gradients
# Names like model.layers.0: hooks further in switch the fused layers off, whose overflow differs.
_DEPTH = 3
_METRICS = ("loss", "grad_norm", "ratio/token_log_max", "ratio/token_var", "ratio/sequence_log_max")


@dataclass
class CrashReport:
    """What an update shows when it is redone."""

    reason: str
    """What the run said."""
    before: dict[str, Any]
    """The run's metrics of the update."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """The same metrics now."""
    found: list[str] = field(default_factory=list)
    """Where NaN or inf are, in the order of the computation; empty: nowhere."""

    def describe(self) -> str:
        """Lines for the user."""
        lines = [f"the run said: {self.reason}"]
        shown = [name for name in _METRICS if name in self.metrics or name in self.before]
        lines += [
            f"  {name:<24} then {_number(self.before.get(name)):>12}"
            f"   now {_number(self.metrics.get(name)):>12}"
            for name in shown
        ]
        verdict = "reproduced" if self.found else "not reproduced: everything is finite now"
        return "\n".join([*lines, verdict, *(f"  {place}" for place in self.found)])


def debug_crash(bundle: Path) -> CrashReport:
    """Redo the update of a crash bundle, on one process.

    Args:
        bundle: folder that a run left under its `crash/`.

    Raises:
        ConfigError: no whole crash bundle.
    """
    try:
        read_sealed(bundle)
        crash = json.loads((bundle / CRASH).read_text(encoding="utf-8"))
    except (Damaged, FileNotFoundError) as error:
        raise ConfigError(
            f"{bundle}: no whole crash bundle ({error}); give a folder RUN/crash/STEP-UPDATE of a "
            "run that stopped"
        ) from error
    # The instruments change nothing, and say more.
    config = load_config(str(bundle / CONFIG)).replace(instruments=True)
    prepare_process(config.num_threads)
    task = task_of(config.task)
    policy = saved_policy(config, task, bundle / POLICY)
    trainer = Trainer(config, policy, task, NoLog(bundle))
    load_value_head(bundle / POLICY, trainer.learner)
    experience = load_experience(bundle, policy.device)
    report = CrashReport(reason=crash["reason"], before=crash["metrics"])
    weights = [name for name, p in policy.model.named_parameters() if not _finite(p)]
    report.found += [f"weights before the update: {_some(weights)}"] if weights else []
    with _first_module(policy.model) as module:
        if experience is None:
            with contextlib.suppress(FloatingPointError):
                if crash["update"] == config.updates_per_rollout:
                    evaluate_policy(policy, task, config, crash["step"], trainer.ranks)
                else:
                    trainer.experience(crash["step"])
            report.found += module
        else:
            passed = trainer.learner.gradients(experience, crash["step"], crash["update"])
            report.found += module
            _inspect(trainer.learner, experience, passed, crash, report)
    return report


def _inspect(
    learner: Learner,
    experience: Experience,
    passed: list[Passed],
    crash: dict[str, Any],
    report: CrashReport,
) -> None:
    """Add what the log-probs, the loss and the gradients of the redone update show."""
    step, update = crash["step"], crash["update"]
    report.found += _tokens(experience, passed, learner.share.of_update(update).start)
    report.metrics = learner.observe(experience, passed, step, update)
    report.metrics["loss"] = sum(part.loss for part in passed)
    if not math.isfinite(report.metrics["loss"]):
        report.found.append(f"loss: {report.metrics['loss']}")
    named = learner.named_parameters().items()
    gradients = [n for n, p in named if p.grad is not None and not _finite(p.grad)]
    report.found += [f"gradients: {_some(gradients)}"] if gradients else []
    report.metrics["grad_norm"] = learner.clip_gradients(math.inf)


def _tokens(experience: Experience, passed: list[Passed], first_prompt: int) -> list[str]:
    """Response tokens whose log-prob or ratio is NaN or inf."""
    batch, group = experience.batch, experience.batch.group_size
    new = torch.cat([part.output.logprobs.detach() for part in passed])
    rows = slice(first_prompt * group, first_prompt * group + len(new))
    mask, old = batch.response_mask[rows], experience.old_logprobs[rows]
    lines = []
    for name, values in (("log-prob", new), ("ratio", (new - old).exp())):
        bad = (~values.isfinite() & mask).nonzero()
        if len(bad):
            row, token = bad[0].tolist()
            prompt, sample = divmod(rows.start + row, group)
            lines.append(
                f"{name}s: {len(bad)} of {int(mask.sum())} tokens, the first is token {token} of "
                f"sample {sample} of prompt {prompt}: {values[row, token].item()} (old log-prob "
                f"{old[row, token].item():.4g})"
            )
    return lines


@contextlib.contextmanager
def _first_module(model: nn.Module) -> Iterator[list[str]]:
    """Gives a list that will name the first module whose output holds NaN or inf."""
    found: list[str] = []

    def look(name: str, output: Any) -> None:
        tensors = output if isinstance(output, tuple) else (output,)
        if not found and any(isinstance(t, Tensor) and not _finite(t) for t in tensors):
            found.append(f"first module: {name}")

    handles = [
        module.register_forward_hook(lambda _m, _i, output, name=name: look(name, output))
        for name, module in model.named_modules()
        if 0 < len(name.split(".")) <= _DEPTH
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else str(value or "-")
