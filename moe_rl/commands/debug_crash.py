"""`moe-rl replay-crash BUNDLE`: make the update again that met a number that is not finite.

Forward and backward run as they did, without the optimiser's step; what is found is where the first
such number appears: in which module's output, in which token's log-prob, in which gradient.
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

from moe_rl.config import ConfigError, RunConfig, check_schema, load_config
from moe_rl.run_folder.log import NoLog
from moe_rl.run_folder.sealing import Damaged, read_manifest, verify
from moe_rl.runtime.process import prepare_process
from moe_rl.runtime.wrapped import clip_gradients
from moe_rl.training.crash import CONFIG, CRASH
from moe_rl.training.learner import Passed
from moe_rl.training.start import saved_policy
from moe_rl.training.state import POLICY, BegunStep, load_state
from moe_rl.training.trainer import Trainer

_SHOWN = 5  # gradients named
_DEPTH = 4  # model.layers.0.self_attn; the fused layers allow no hooks on what they read further in
_METRICS = ("loss", "grad_norm", "ratio/token_log_max", "ratio/token_var", "ratio/sequence_log_max")


@dataclass
class Replayed:
    """What an update shows when it is made again."""

    reason: str
    """What the run said."""
    before: dict[str, Any]
    """The run's metrics of the update."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """The same metrics now."""
    found: list[str] = field(default_factory=list)
    """Where numbers are not finite, in the order of the computation; empty: nowhere."""

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


def replay_crash(bundle: Path) -> Replayed:
    """Make the update of a crash bundle again, on one process.

    Args:
        bundle: folder that a run left under its `crash/`.

    Raises:
        ConfigError: no whole bundle, or of another version of the project.
    """
    config, crash = _read(bundle)
    prepare_process(config.num_threads)
    # The instruments change nothing, and say more.
    config = config.replace(instruments=True)
    policy = saved_policy(config, bundle / POLICY)
    result = Replayed(reason=crash["reason"], before=crash["metrics"])
    weights = [n for n, p in policy.model.named_parameters() if not _finite(p)]
    result.found += [f"weights before the update: {_some(weights)}"] if weights else []
    trainer = Trainer(config, policy, NoLog(bundle))
    trainer.progress = load_state(bundle, trainer.learner)
    with _first_module(policy.model) as module:
        if trainer.progress.begun is None:
            with contextlib.suppress(FloatingPointError):
                trainer.experience(trainer.progress.step)
            result.found += module
        else:
            _again(trainer, trainer.progress.begun, module, result)
    return result


def _again(trainer: Trainer, begun: BegunStep, module: list[str], result: Replayed) -> None:
    """Forward and backward of the update."""
    learner, step, update = trainer.learner, trainer.progress.step, begun.update
    passed = learner.gradients(begun.experience, step, update)
    result.found += module
    result.found += _tokens(begun, passed, learner.share.of_update(update).start)
    result.metrics = learner.observe(begun.experience, passed, step, update)
    result.metrics["loss"] = sum(part.loss.loss.item() for part in passed)
    if not math.isfinite(result.metrics["loss"]):
        result.found.append(f"loss: {result.metrics['loss']}")
    named = trainer.policy.model.named_parameters()
    gradients = [n for n, p in named if p.grad is not None and not _finite(p.grad)]
    if gradients:
        result.found.append(f"gradients: {_some(gradients)}")
    result.metrics["grad_norm"] = clip_gradients(learner.parameters, math.inf)


def _tokens(begun: BegunStep, passed: list[Passed], first_prompt: int) -> list[str]:
    """Response tokens whose log-prob or ratio is not finite."""
    batch, group = begun.experience.batch, begun.experience.batch.group_size
    new = torch.cat([part.output.logprobs.detach() for part in passed])
    rows = slice(first_prompt * group, first_prompt * group + len(new))
    mask, old = batch.response_mask[rows], begun.experience.old_logprobs[rows]
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
    """Gives a list that will name the first module with an output that is not finite."""
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


def _read(bundle: Path) -> tuple[RunConfig, dict[str, Any]]:
    try:
        manifest = read_manifest(bundle)
        check_schema(manifest.get("schema"), bundle)
        verify(bundle, manifest)
    except Damaged as damage:
        raise ConfigError(
            f"{damage}; give a crash bundle, a folder RUN/crash/STEP-UPDATE of a run that stopped"
        ) from damage
    if CRASH not in manifest["files"]:
        raise ConfigError(f"{bundle}: a checkpoint, not a crash bundle: it has no {CRASH}")
    crash: dict[str, Any] = json.loads((bundle / CRASH).read_text(encoding="utf-8"))
    return load_config(str(bundle / CONFIG)), crash


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else str(value or "-")
