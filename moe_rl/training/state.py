"""What a run must remember to resume bit for bit, as files of one checkpoint.

    policy/                 Hugging Face checkpoint with the tokenizer, and the value head, if any,
                            in value_head.safetensors. Weights are float32 (the masters) also where
                            the policy's are bfloat16, which its config.json then says.
    optimizer.safetensors   AdamW's moments and step counts, by parameter name
    progress.json           rollout steps done, their rewards, and seconds by purpose

Randomness has no state: every draw is a function of (run seed, step, prompt, sample, purpose).
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from moe_rl.policy.folder import load_model
from moe_rl.run_folder.sealing import Fill
from moe_rl.runtime.wrapped import shard_like, whole_tensor
from moe_rl.training.learner import Learner

POLICY = "policy"
_OPTIMIZER, _PROGRESS = "optimizer.safetensors", "progress.json"
_VALUE_HEAD = "value_head.safetensors"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands between two rollout steps."""

    step: int = 0
    """Rollout steps done."""
    rewards: list[float] = field(default_factory=list)
    """Mean reward of each of them."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Time spent so far, by purpose."""


def collect_policy(learner: Learner) -> Fill:
    """What writes the policy in Hugging Face format, and the value head beside it.

    All ranks call this, one writes.
    """
    policy, head = learner.policy, learner.value_head
    model, whole = policy.model, None
    sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    if sharded or learner.weights.has_copies:
        exact = learner.weights.exact(model.state_dict(keep_vars=True))
        whole = {name: whole_tensor(value) for name, value in exact.items()}

    values = {}
    if head is not None:
        values = {name: whole_tensor(p.detach()) for name, p in head.named_parameters()}

    def fill(path: Path) -> None:
        model.save_pretrained(path, state_dict=whole)
        policy.tokenizer.save_pretrained(path)
        if values:
            save_file(values, path / _VALUE_HEAD)

    return fill


def collect_state(progress: Progress, learner: Learner) -> Fill:
    """What writes all of a run's state into a folder; all ranks call this, one writes.

    The files do not depend on the number of ranks, and can be read on any number of them.
    """
    fill_policy = collect_policy(learner)
    optimizer = {
        f"{name}/{key}": whole_tensor(value).contiguous()
        for name, parameter in learner.stepped_parameters().items()
        for key, value in learner.optimizer.state.get(parameter, {}).items()
    }

    def fill(path: Path) -> None:
        fill_policy(path / POLICY)
        save_file(optimizer, path / _OPTIMIZER)
        # Not by `jsonable`: a NaN or inf must come back as it was.
        text = json.dumps(dataclasses.asdict(progress))
        (path / _PROGRESS).write_text(text, encoding="utf-8")

    return fill


def load_progress(checkpoint: Path) -> Progress:
    """Where the run stood when a checkpoint was written."""
    return Progress(**json.loads((checkpoint / _PROGRESS).read_text(encoding="utf-8")))


def load_value_head(folder: Path, learner: Learner) -> None:
    """Put the value head, where the learner has one, where it was when the policy was saved."""
    if learner.value_head is None:
        return
    saved = load_file(folder / _VALUE_HEAD)
    with torch.no_grad():
        for name, parameter in learner.value_head.named_parameters():
            parameter.copy_(shard_like(saved[name], parameter))


def load_masters(folder: Path, learner: Learner) -> None:
    """Put the float32 masters, where there are any, where they were when the policy was saved."""
    if not learner.weights.has_copies:
        return
    # As a model: files may name and split weights otherwise than the model that they make.
    model = load_model(folder, str(folder), tokenizer=True, dtype=torch.float32)
    stepped = learner.stepped_parameters()
    with torch.no_grad():
        for name, saved in model.named_parameters():
            if name in stepped:
                stepped[name].copy_(shard_like(saved, stepped[name]))


def load_optimizer(checkpoint: Path, learner: Learner) -> None:
    """Put the optimiser where it was; the learner is new, its policy loaded from the checkpoint."""
    stepped = learner.stepped_parameters()
    # PyTorch knows an optimiser's parameters by their number.
    numbers = {name: number for number, name in enumerate(stepped)}
    state: dict[int, dict[str, Tensor]] = {}
    for full_name, tensor in load_file(checkpoint / _OPTIMIZER).items():
        name, key = full_name.rsplit("/", 1)
        state.setdefault(numbers[name], {})[key] = shard_like(tensor, stepped[name])
    learner.optimizer.load_state_dict({**learner.optimizer.state_dict(), "state": state})
