"""What the ranks of the tests do: python workers.py NAME FOLDER [ARGUMENTS], once a rank."""

import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
from runs import Killed, killed_after
from safetensors.torch import save_file

from moe_rl.config import RunConfig
from moe_rl.policy.tokenizer import tokenizer_of
from moe_rl.presets import preset
from moe_rl.replay_check.families import build_family
from moe_rl.run_folder.log import NoLog
from moe_rl.runtime.process import prepare_process
from moe_rl.runtime.ranks import Ranks, join
from moe_rl.runtime.stopping import PeerFailed
from moe_rl.runtime.wrapped import whole_tensor
from moe_rl.tasks import task_of
from moe_rl.training.cold_start import starting_policy
from moe_rl.training.learner import Learner
from moe_rl.training.run import train
from moe_rl.training.trainer import Trainer

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "uneven": {"prompts_per_rollout": 6, "updates_per_rollout": 2},
    "empty": {"prompts_per_rollout": 4, "updates_per_rollout": 4},
    "accumulated": {
        "prompts_per_rollout": 6,
        "updates_per_rollout": 2,
        "prompts_per_forward": 1,
    },
    "token mean": {
        "algorithm": "dapo",
        "prompts_per_rollout": 6,
        "updates_per_rollout": 2,
        "prompts_per_forward": 1,
    },
    "fixed length": {"algorithm": "dr_grpo", "prompts_per_rollout": 6, "updates_per_rollout": 2},
    "reads routers": {
        "algorithm": "rspo",
        "router_noise": 0.3,
        "prompts_per_rollout": 6,
        "updates_per_rollout": 2,
        "prompts_per_forward": 1,
    },
    "R2, noise": {"routing_replay": "R2", "router_noise": 0.3},
    "R3, gspo": {"routing_replay": "R3", "router_noise": 0.3, "algorithm": "gspo"},
    "TRR, noise": {"routing_replay": "TRR", "router_noise": 0.3},
    "engine's log-probs": {"old_logprobs": "rollout"},
    "frozen router": {"freeze_router": True},
    "rounded rollout": {"rollout_precision": "int4", "routing_replay": "R3"},
    "value head": {"algorithm": "ppo"},
    "unequal prompts": {"task": "countdown", "sft_steps": 10},
    "checkpointing": {"gradient_checkpointing": True, "routing_replay": "R2"},
}


def tiny(**changes: Any) -> RunConfig:
    small = {"steps": 2, "prompts_per_rollout": 8, "group_size": 4, "learning_rate": 2e-3}
    return preset("tiny").replace(**small | {"sft_steps": 60} | changes).named()


def gradients(trainer: Trainer) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Gradients of each update of one rollout, weights unmoved, and all metrics."""
    learner = trainer.learner
    if learner.value_head is not None:  # it begins as 0, and passes no gradient on
        torch.nn.init.constant_(learner.value_head.weight, 0.1)
    experience, metrics = trainer.experience(0)
    found, lines = {}, [metrics]
    # Of the policy's own rewards nearly all groups are equal: nothing to learn from.
    share, config = learner.share, trainer.config
    drawn = torch.randn(
        share.num_prompts, config.group_size, generator=torch.Generator().manual_seed(0)
    )
    own = drawn[share.rank :: share.size].flatten()
    experience = dataclasses.replace(experience, advantages=own)
    for update in range(trainer.config.updates_per_rollout):
        learner.gradients(experience, 0, update)
        for name, parameter in learner.named_parameters().items():
            if parameter.grad is not None:
                found[f"{update}/{name}"] = whole_tensor(parameter.grad).clone()
        learner.optimizer.zero_grad(set_to_none=True)
    for update in range(trainer.config.updates_per_rollout):
        lines.append(learner.update(experience, 0, update))
    return found, lines


def all_gradients(ranks: Ranks, folder: Path, parallelism: Any) -> None:
    prepare_process(1)
    for name, changes in VARIANTS.items():
        config = tiny(**changes)
        task = task_of(config.task)
        policy = starting_policy(
            config, task, folder / "cold", ranks=ranks, sharded=parallelism == "fsdp"
        )
        trainer = Trainer(config, policy, task, NoLog(folder), ranks=ranks, parallelism=parallelism)
        found, lines = gradients(trainer)
        if ranks.main:
            kept = {key: value.contiguous() for key, value in found.items()}
            save_file(kept, folder / f"{name}.{parallelism}.safetensors")
        (folder / f"{name}.{parallelism}.{ranks.rank}.json").write_text(json.dumps(lines))


def families(ranks: Ranks, folder: Path) -> None:
    """Gradients and updates: parameters outside the loss, and float32 masters."""
    prepare_process(1)
    kinds: tuple[tuple[str, Any, Any], ...]
    kinds = (("deepseek_v32", "ddp", "float32"), ("deepseek_v3", "fsdp", "bfloat16"))
    for family, parallelism, dtype in kinds:
        with ranks.together():
            if ranks.main:
                build_family(family, max_position_embeddings=64).save_pretrained(folder / family)
                tokenizer_of("0123456789=").save_pretrained(folder / family)
        config = tiny(checkpoint=str(folder / family), dtype=dtype, sft_steps=0)
        task = task_of(config.task)
        policy = starting_policy(config, task, folder, sharded=parallelism == "fsdp")
        trainer = Trainer(config, policy, task, NoLog(folder), ranks=ranks, parallelism=parallelism)
        found, lines = gradients(trainer)
        kept = {key: value.contiguous() for key, value in found.items()}
        if ranks.main:
            save_file(kept, folder / f"{family}.{ranks.size}.safetensors")
            (folder / f"{family}.{ranks.size}.json").write_text(json.dumps(lines))


def exchange(ranks: Ranks, folder: Path) -> None:
    """What ranks tell each other; each finds its own errors."""
    for dtype in (
        torch.float32,
        torch.float64,
        torch.int16,
        torch.int64,
        torch.bool,
        torch.bfloat16,
    ):
        for counts in ((2, 3), (0, 2), (1, 0), (0, 0)):
            rows = [torch.arange(6 * n).view(n, 2, 3).to(dtype) for n in counts]
            numbers = [torch.arange(2 * n + 1) + 10 * rank for rank, n in enumerate(counts)]
            own = {"odd": rows[ranks.rank] > 3, "rows": rows[ranks.rank]}
            found = ranks.gather(own | {"numbers": numbers[ranks.rank]})
            assert torch.equal(found["rows"], torch.cat(rows)), (dtype, counts)
            assert torch.equal(found["odd"], torch.cat(rows) > 3), (dtype, counts)
            assert torch.equal(found["numbers"], torch.cat(numbers)), (dtype, counts)
    strange = ranks.gather({"x": torch.tensor([float("nan"), -0.0])})["x"]
    assert strange.isnan().sum() == 2 and strange.signbit().sum() == 2
    assert ranks.largest(3 - ranks.rank) == 3
    assert ranks.total(0.5 + ranks.rank) == 2.0
    with ranks.together():
        pass
    caught = ""
    try:
        with ranks.together():
            if ranks.rank == 1:
                raise OSError("disk full")
    except (OSError, PeerFailed) as error:
        caught = type(error).__name__
    assert caught == ("OSError" if ranks.rank == 1 else "PeerFailed")


def die_again_and_again(folder: Path, parallelism: Any) -> None:
    """A whole run, and one that dies within step 0, after it, and within step 2, and is resumed."""
    options: dict[str, Any] = {"cold_start_cache": folder / "cold", "parallelism": parallelism}
    train(moving(), folder / "whole", **options)
    for updates in (2, 4, 6):
        with contextlib.suppress(Killed), killed_after(updates):
            train(moving(), folder / "run", resume=True, on_damage=lambda _: None, **options)
            raise AssertionError("not killed")
    train(moving(), folder / "run", resume=True, **options)


def die_in_the_middle(folder: Path) -> None:
    """A run of two ranks that another number of ranks is to resume after step 0."""
    with contextlib.suppress(Killed), killed_after(6):
        train(moving(2), folder / "run", cold_start_cache=folder / "cold", parallelism="fsdp")


def moving(steps: int = 3) -> RunConfig:
    return tiny(
        steps=steps, checkpoint_every=1, save_every=steps, routing_replay="R2", router_noise=0.2
    )


def nan_on_one_rank(ranks: Ranks, folder: Path) -> None:
    """The last rank's loss is NaN in the sixth update."""
    real, calls = Learner.gradients, [0]

    def gradients(self: Learner, *arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 6 and self.ranks.rank == 1:
            loss = self.algorithm.loss
            self.algorithm = self.algorithm._replace(
                loss=lambda inputs, **options: loss(
                    dataclasses.replace(inputs, logprobs=inputs.logprobs * float("nan")), **options
                )
            )
        return real(self, *arguments)

    Learner.gradients = gradients  # type: ignore[method-assign]
    try:
        train(moving(), folder / "run", cold_start_cache=folder / "cold")
        said = "nothing"
    except FloatingPointError as error:
        said = str(error)
    (folder / f"said{ranks.rank}").write_text(said)


def main() -> None:
    name, folder, *rest = sys.argv[1:]
    torch.set_num_threads(1)
    with join() as ranks:
        if name == "gradients":
            all_gradients(ranks, Path(folder), rest[0])
        elif name == "families":
            families(ranks, Path(folder))
        elif name == "exchange":
            exchange(ranks, Path(folder))
        elif name == "nan_on_one_rank":
            nan_on_one_rank(ranks, Path(folder))
        elif name == "die_again_and_again":
            die_again_and_again(Path(folder), rest[0])
        elif name == "die_in_the_middle":
            die_in_the_middle(Path(folder))
        else:
            raise SystemExit(f"no worker {name!r}")


if __name__ == "__main__":
    main()
