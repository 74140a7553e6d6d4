"""What a run starts from: a supervised cold start on noisy demonstrations, cached by its hash.

Each step of a demonstration slips with a small probability and continues from the slip. The policy
that has converged on them is calibrated: it is right as often as its teacher, and its mistakes are
samples of a distribution that reinforcement learning can sharpen.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor
from transformers import Qwen3MoeForCausalLM

from moe_rl.config import RunConfig
from moe_rl.policy.build import build_policy, resolve_device
from moe_rl.policy.fit import check_fit
from moe_rl.policy.folder import find_model
from moe_rl.policy.policy import Policy
from moe_rl.policy.tokenizer import encode_prompt
from moe_rl.routing import collect_router_logits, find_routers
from moe_rl.run_folder.log import check_can_be_made, jsonable
from moe_rl.run_folder.sealing import is_whole, read_sealed, write_sealed
from moe_rl.runtime.process import process_of
from moe_rl.runtime.ranks import Ranks
from moe_rl.runtime.seeding import generator
from moe_rl.tasks import Dataset, Prompt, Task, task_of
from moe_rl.training.evaluation import sample_rewards
from moe_rl.training.master_weights import MasterWeights

# Part of the hash: raise it when a change here makes other weights from the same config.
_VERSION = 5
# Threads are part of what makes the weights (the order of sums), so they are fixed. Two are a
# quarter faster where nothing else runs, and three times as slow where something does.
_THREADS = 1
_EVALUATION_PROMPTS = 512
_MAX_GRAD_NORM = 1.0


def starting_policy(
    config: RunConfig,
    task: Task,
    cold_start_cache: Path,
    on_cold_start: Callable[[int, float], None] | None = None,
    *,
    ranks: Ranks | None = None,
    sharded: bool = False,
) -> Policy:
    """The policy every arm and seed starts from: cold-started, or as built or loaded.

    Args:
        config: the run.
        task: its task.
        cold_start_cache: folder of all cold starts.
        on_cold_start: called with (supervised step, loss).
        ranks: processes that train together, all of which call this; alone by default. The main one
            makes the cold start: transformers lets no other save a model.
        sharded: see `build_policy`.

    Raises:
        ConfigError: the policy cannot be built, or cannot hold the task's prompts and responses.
        PeerFailed: the main rank could not make the cold start.
    """
    ranks = ranks or Ranks()
    if config.sft_steps:
        for makes in (ranks.main, not ranks.main):  # what one makes, the others find
            with ranks.together():
                if makes:
                    folder = ensure_cold_start(config, task, cold_start_cache, on_cold_start)
        return saved_policy(config, task, folder, sharded=sharded)
    policy = build_policy(
        config.model,
        task.alphabet,
        seed=config.cold_start.sft_seed,
        temperature=config.temperature,
        sharded=sharded,
    )
    check_fit(policy, task)
    return policy


def saved_policy(config: RunConfig, task: Task, folder: Path, *, sharded: bool = False) -> Policy:
    """The policy of a run as a folder has it: its cold start, or one of its checkpoints."""
    model = dataclasses.replace(config.model, checkpoint=str(folder))
    return build_policy(model, task.alphabet, temperature=config.temperature, sharded=sharded)


def cold_start_hash(config: RunConfig, task: Task) -> str:
    """Hash of all that decides the weights: model, task, cold start, device, torch, our version."""
    made_of = _made_of(config, task) | {
        "version": _VERSION,
        "torch": torch.__version__,
        "device": resolve_device(config.model.device).type,
        "checkpoint": _content_of(config.model.checkpoint),
    }
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]


def ensure_cold_start(
    config: RunConfig, task: Task, cache: Path, progress: Callable[[int, float], None] | None = None
) -> Path:
    """Folder of the cold-start checkpoint for `config`, made now if the cache lacks it.

    Args:
        config: the run; only its model, task and cold-start parts count.
        task: the task of the run.
        cache: folder of all cold starts.
        progress: called with (supervised step, loss).

    Raises:
        FloatingPointError: the cold start has diverged.
    """
    folder = cache / cold_start_hash(config, task)
    if is_whole(folder):
        return folder
    check_can_be_made(cache, "cold_start_cache")
    with process_of(_THREADS):
        policy = build_policy(config.model, task.alphabet, seed=config.cold_start.sft_seed)
    check_fit(policy, task)
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f".{folder.name}.lock"):
        if is_whole(folder):  # another process has made it meanwhile
            return folder
        with process_of(_THREADS):
            loss = train_on_demonstrations(policy, task, config, progress)
            if not math.isfinite(loss):
                raise FloatingPointError(
                    "the cold start has diverged at sft_learning_rate="
                    f"{config.cold_start.sft_learning_rate:g}, take a smaller one"
                )
            reward = evaluate(policy, task, config)

        def fill(path: Path) -> None:
            policy.model.save_pretrained(path)
            policy.tokenizer.save_pretrained(path)

        about = {"loss": loss, "reward": reward, **_made_of(config, task)}
        write_sealed(folder, fill, jsonable(about))
    return folder


def prepare_cold_starts(configs: Sequence[RunConfig], cache: Path) -> None:
    """Make every cold start that the runs need, before they race for it; prints what it does."""
    seen = set()
    for config in configs:
        if config.sft_steps == 0:
            continue
        task = task_of(config.task)
        name = cold_start_hash(config, task)
        if name in seen:
            continue
        seen.add(name)
        experts = f"{config.model.num_experts} experts"
        if not is_whole(cache / name):
            print(f"cold start {name} ({config.task.task}, {experts}): training", flush=True)
        reward = read_sealed(ensure_cold_start(config, task, cache))["reward"]
        print(f"cold start {name} ({experts}): reward {reward:.3f}", flush=True)


def _content_of(checkpoint: str | None) -> list[tuple[str, int, int]]:
    """Names, sizes and times of a checkpoint's files: its path or hub id may later hold another."""
    if checkpoint is None:
        return []
    stats = [(file.name, file.stat()) for file in sorted(find_model(checkpoint).glob("*"))]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def _made_of(config: RunConfig, task: Task) -> dict[str, Any]:
    # A dataset is what it holds, wherever it lies; options left out decide nothing, nor does what
    # judges responses or is held out.
    options = dataclasses.asdict(config.task) | {"dataset": None, "judge": None}
    if isinstance(task, Dataset):
        options["dataset_sha256"] = task.sha256
    left_out = ("evaluation_", "reward", "program_")
    return {
        "model": dataclasses.asdict(config.model),
        "task": {
            name: value
            for name, value in options.items()
            if value not in (None, False) and not name.startswith(left_out)
        },
        "cold_start": dataclasses.asdict(config.cold_start) | {"sft_steps": config.sft_steps},
    }


def train_on_demonstrations(
    policy: Policy,
    task: Task,
    config: RunConfig,
    progress: Callable[[int, float], None] | None = None,
) -> float:
    """Supervised training in place; returns the last loss in nats per response token."""
    settings = config.cold_start
    steps = config.sft_steps
    model = policy.model  # in evaluation mode: dropout draws from a state that no seed decides
    router = find_routers(model)[0]
    balanced = settings.load_balance_coef > 0 and router.num_experts > router.top_k
    weights = MasterWeights(model.parameters())
    optimizer = torch.optim.AdamW(
        weights.masters, lr=settings.sft_learning_rate, betas=(0.9, 0.95), weight_decay=0.0
    )
    loss = torch.tensor(float("nan"))
    for step in range(steps):
        for group in optimizer.param_groups:
            decay = max(0.05, 1 - step / steps)
            group["lr"] = settings.sft_learning_rate * min(1.0, step / 20) * decay
        rng = generator(settings.sft_seed, "demonstrations", step=step)
        pairs = task.demonstrations(rng, settings.sft_batch_size, settings.slip)
        ids, mask, labels = _supervised_batch(policy, pairs)
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, "use_cache": False}
        if balanced:
            loss, logits = _loss_and_router_logits(model, batch)
            uneven = load_balancing_loss(logits, router.top_k, mask)
            loss = loss + settings.load_balance_coef * uneven
        else:
            loss = model(**batch).loss
        loss.backward()
        weights.take_gradients()
        torch.nn.utils.clip_grad_norm_(weights.masters, _MAX_GRAD_NORM)
        weights.step(optimizer)
        optimizer.zero_grad()
        if progress is not None:
            progress(step, loss.item())
    return loss.item()


def _loss_and_router_logits(model: Any, batch: dict[str, Any]) -> tuple[Tensor, Sequence[Tensor]]:
    if isinstance(model, Qwen3MoeForCausalLM):
        # It hands out raw logits itself. Mixtral hands out probabilities, DeepSeek-V3 nothing.
        model.config.router_aux_loss_coef = 0.0  # ours balances every layer, not their sum
        output = model(**batch, output_router_logits=True)
        return output.loss, output.router_logits
    with collect_router_logits(model) as logits:
        loss = model(**batch).loss
    return loss, logits


def load_balancing_loss(router_logits: Sequence[Tensor], top_k: int, mask: Tensor) -> Tensor:
    """E * sum_i f_i P_i, averaged over layers: 1 when balanced, up to E / K.

    f_i is the share of expert slots that expert i gets, P_i its mean probability (Switch
    Transformer, arXiv 2101.03961, eq. 4-6), here per layer.

    Args:
        router_logits: for each layer [..., E], N tokens.
        top_k: experts per token K.
        mask: bool or 0/1, N values in any shape: tokens that count.
    """
    logits = torch.stack([layer.flatten(0, -2).float() for layer in router_logits])
    kept = mask.flatten().to(logits.dtype)
    probabilities = logits.softmax(-1)
    chosen = torch.zeros_like(probabilities).scatter_(-1, probabilities.topk(top_k).indices, 1.0)
    share = torch.einsum("lne,n->le", chosen, kept) / (kept.sum() * top_k)
    mean = torch.einsum("lne,n->le", probabilities, kept) / kept.sum()
    return logits.shape[-1] * (share * mean).sum(-1).mean()


def _supervised_batch(
    policy: Policy, pairs: list[tuple[Prompt, str]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded ids, mask and labels [N, S]; the loss counts response tokens only."""
    prompts = [encode_prompt(policy.tokenizer, p) for p, _ in pairs]
    completions = [policy.tokenizer.encode(c, add_special_tokens=False) for _, c in pairs]
    rows = [p + c + [policy.eos_id] for p, c in zip(prompts, completions, strict=True)]
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), policy.pad_id)
    labels = torch.full((len(rows), width), -100)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        tokens = torch.tensor(row)
        ids[i, : len(row)] = tokens
        mask[i, : len(row)] = 1
        labels[i, len(prompt) : len(row)] = tokens[len(prompt) :]
    device = policy.device
    return ids.to(device), mask.to(device), labels.to(device)


def evaluate(policy: Policy, task: Task, config: RunConfig) -> float:
    """Mean reward of one sample each on fresh prompts."""
    seed = config.cold_start.sft_seed
    problems = task.prompts(generator(seed, "cold_start_evaluation"), _EVALUATION_PROMPTS)
    rewards = sample_rewards(
        policy,
        task,
        problems,
        numbers=range(len(problems)),
        seed=seed,
        purpose="cold_start_evaluation_samples",
    )
    return float(rewards.mean())
