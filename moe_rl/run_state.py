"""What a run must remember to go on bit for bit, as files of one checkpoint.

    policy/                 Hugging Face checkpoint with the tokenizer
    optimizer.safetensors   AdamW's moments and step counts, by parameter name
    progress.json           where the run stands, its rewards and times, lengths of its logs
    rollout.safetensors     within a rollout step: the rollout that its updates go on with

Randomness has no state: every draw is a function of (run seed, step, prompt, sample, purpose).
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moe_rl.experience import Experience
from moe_rl.policy import Policy
from moe_rl.rollout.batch import RolloutBatch

POLICY = "policy"
_OPTIMIZER, _ROLLOUT, _PROGRESS = "optimizer.safetensors", "rollout.safetensors", "progress.json"


@dataclass(frozen=True, kw_only=True)
class BegunStep:
    """A rollout step of which some updates are made."""

    update: int
    """Updates made, at least 1."""
    experience: Experience
    metrics: dict[str, Any]
    """Of the rollout."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands between two updates."""

    step: int = 0
    """Rollout step that is next or, with `begun`, under way."""
    rewards: list[float] = field(default_factory=list)
    """Of the steps that are done."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Spent so far, by purpose."""
    seconds_before: dict[str, float] = field(default_factory=dict)
    """The same when the step under way began."""
    begun: BegunStep | None = None


def save_state(
    path: Path,
    progress: Progress,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    log_sizes: dict[str, int],
) -> None:
    """Write all of it into the folder `path`."""
    policy.model.save_pretrained(path / POLICY)
    policy.tokenizer.save_pretrained(path / POLICY)
    save_file(_optimizer_tensors(policy.model, optimizer), path / _OPTIMIZER)
    begun = progress.begun
    values = {
        "step": progress.step,
        "update": 0 if begun is None else begun.update,
        "metrics": {} if begun is None else begun.metrics,
        "rewards": progress.rewards,
        "seconds": progress.seconds,
        "seconds_before": progress.seconds_before,
        "log_sizes": log_sizes,
    }
    # Not by `jsonable`: a metric that is NaN or infinite must come back as it was.
    (path / _PROGRESS).write_text(json.dumps(values), encoding="utf-8")
    if begun is not None:
        save_file(_experience_tensors(begun.experience), path / _ROLLOUT)


def load_log_sizes(path: Path) -> dict[str, int]:
    """How long each log was, bytes by file name."""
    sizes: dict[str, int] = _read_progress(path)["log_sizes"]
    return sizes


def load_state(path: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> Progress:
    """Put the optimiser where it was, and return where the run stands.

    Args:
        path: folder of a whole checkpoint.
        policy: the policy, loaded from `path / POLICY`.
        optimizer: of its parameters, new.
    """
    _restore_optimizer(load_file(path / _OPTIMIZER), policy.model, optimizer)
    values = _read_progress(path)
    begun = None
    if values["update"]:
        tensors = load_file(path / _ROLLOUT, device=str(policy.device))
        begun = BegunStep(
            update=values["update"], experience=_experience(tensors), metrics=values["metrics"]
        )
    return Progress(
        step=values["step"],
        rewards=values["rewards"],
        seconds=values["seconds"],
        seconds_before=values["seconds_before"],
        begun=begun,
    )


def _read_progress(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((path / _PROGRESS).read_text(encoding="utf-8"))
    return values


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": value.contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _restore_optimizer(
    tensors: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    states: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        name, key = full_name.rsplit("/", 1)
        states.setdefault(name, {})[key] = tensor
    index = {id(p): i for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"])}
    state = {
        index[id(parameter)]: states[name]
        for name, parameter in model.named_parameters()
        if name in states
    }
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _experience_tensors(experience: Experience) -> dict[str, Tensor]:
    tensors = {}
    for prefix, part in (("", experience), ("batch.", experience.batch)):
        for entry in dataclasses.fields(part):
            value = getattr(part, entry.name)
            if isinstance(value, Tensor):
                # Replay and record may be one tensor; a file holds each by itself.
                tensors[prefix + entry.name] = value.detach().clone().contiguous()
    return tensors


def _experience(tensors: dict[str, Tensor]) -> Experience:
    batch = {entry.name: tensors.get(f"batch.{entry.name}") for entry in _fields(RolloutBatch)}
    own = {entry.name: tensors.get(entry.name) for entry in _fields(Experience)}
    return Experience(**own | {"batch": RolloutBatch(**batch)})  # type: ignore[arg-type]


def _fields(kind: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(kind)
