"""What a run must remember to go on bit for bit, as files of one checkpoint.

    policy/                 Hugging Face checkpoint with the tokenizer
    optimizer.safetensors   AdamW's moments and step counts, by parameter name
    progress.json           where the run stands, its rewards and times, what its logs held
    rollout.safetensors     within a rollout step: the rollout that its updates go on with

Randomness has no state: every draw is a function of (run seed, step, prompt, sample, purpose).
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe_rl.batch import RolloutBatch
from moe_rl.experience import Experience
from moe_rl.policy.policy import Policy
from moe_rl.run_folder.log import Marks
from moe_rl.runtime.share import Share
from moe_rl.runtime.wrapped import shard_like, whole_tensor
from moe_rl.training.learner import Learner

POLICY = "policy"
_OPTIMIZER, _ROLLOUT, _PROGRESS = "optimizer.safetensors", "rollout.safetensors", "progress.json"


@dataclass(frozen=True, kw_only=True)
class BegunStep:
    """A rollout step of which some updates are made."""

    update: int
    """Updates made."""
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

    @property
    def update(self) -> int:
        """Updates made of the step under way."""
        return 0 if self.begun is None else self.begun.update


Fill = Callable[[Path], None]
"""Writes into the folder it is given."""


def collect_policy(policy: Policy) -> Fill:
    """What writes the policy in Hugging Face format; all ranks call this, one writes."""
    model, whole = policy.model, None
    if any(isinstance(p, DTensor) for p in model.parameters()):
        whole = {name: whole_tensor(value) for name, value in model.state_dict().items()}

    def fill(path: Path) -> None:
        model.save_pretrained(path, state_dict=whole)
        policy.tokenizer.save_pretrained(path)

    return fill


def collect_state(progress: Progress, learner: Learner, log_marks: Marks) -> Fill:
    """What writes all of a run's state into a folder; all ranks call this, one writes.

    The state says nothing of how many ranks there are: it can be read on any number of them.
    """
    policy, begun = collect_policy(learner.policy), progress.begun
    optimizer = _optimizer_tensors(learner.policy.model, learner.optimizer)
    rollout = None if begun is None else _rollout_tensors(begun.experience, learner)
    values = {
        "step": progress.step,
        "update": progress.update,
        "begun": begun is not None,
        "metrics": {} if begun is None else begun.metrics,
        "rewards": progress.rewards,
        "seconds": progress.seconds,
        "seconds_before": progress.seconds_before,
        "logs": log_marks,
    }

    def fill(path: Path) -> None:
        policy(path / POLICY)
        save_file(optimizer, path / _OPTIMIZER)
        # Not by `jsonable`: a metric that is NaN or infinite must come back as it was.
        (path / _PROGRESS).write_text(json.dumps(values), encoding="utf-8")
        if rollout is not None:
            save_file(rollout, path / _ROLLOUT)

    return fill


def load_log_marks(path: Path) -> Marks:
    """What each log held."""
    marks: Marks = _read_progress(path)["logs"]
    return marks


def load_state(path: Path, learner: Learner) -> Progress:
    """Put the optimiser where it was, and return where the run stands.

    Args:
        path: folder of a whole checkpoint.
        learner: new, its policy loaded from `path / POLICY`.
    """
    policy = learner.policy
    _restore_optimizer(load_file(path / _OPTIMIZER), policy.model, learner.optimizer)
    values = _read_progress(path)
    begun = None
    if values["begun"]:
        tensors = load_file(path / _ROLLOUT, device=str(policy.device))
        rows = {name: _own_rows(tensor, learner.share) for name, tensor in tensors.items()}
        begun = BegunStep(
            update=values["update"], experience=_experience(rows), metrics=values["metrics"]
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
        f"{name}/{key}": whole_tensor(value).contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _restore_optimizer(
    tensors: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    parameters = dict(model.named_parameters())
    states: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        name, key = full_name.rsplit("/", 1)
        states.setdefault(name, {})[key] = shard_like(tensor, parameters[name])
    index = {id(p): i for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"])}
    state = {index[id(parameters[name])]: values for name, values in states.items()}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _rollout_tensors(experience: Experience, learner: Learner) -> dict[str, Tensor]:
    """The rollout of all ranks, prompt by prompt."""
    own = {
        prefix + entry.name: getattr(part, entry.name)
        for prefix, part in (("", experience), ("batch.", experience.batch))
        for entry in dataclasses.fields(part)
    }
    rows = {name: value for name, value in own.items() if isinstance(value, Tensor)}
    order = learner.share.order()
    return {
        # Replay and record may be one tensor; indexing gives a file each its own.
        name: whole.unflatten(0, (len(order), -1))[order].flatten(0, 1).contiguous()
        for name, whole in learner.ranks.gather(rows).items()
    }


def _own_rows(tensor: Tensor, share: Share) -> Tensor:
    """A rank's part of a tensor with as many rows a prompt for each prompt of the rollout."""
    return tensor.unflatten(0, (share.num_prompts, -1))[share.rank :: share.size].flatten(0, 1)


def _experience(tensors: dict[str, Tensor]) -> Experience:
    batch = {entry.name: tensors.get(f"batch.{entry.name}") for entry in _fields(RolloutBatch)}
    own = {entry.name: tensors.get(entry.name) for entry in _fields(Experience)}
    return Experience(**own | {"batch": RolloutBatch(**batch)})  # type: ignore[arg-type]


def _fields(kind: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(kind)
