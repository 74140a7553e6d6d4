"""Speed of training against TRL's GRPOTrainer: same model, batch, token counts, threads, machine.

    moe-rl bench training --out results.json

Interleaved in one process: TRL trains, and at each of its rollout boundaries our trainer takes one
rollout step with instruments, one without, and one that takes the old log-probs from the engine,
each on its own copy of the policy, while TRL's clock stands. What the machine does to one side it
does to all.

Useful operations are those of the algorithm on the tokens that must be read: prompts once a group,
two operations a multiply-add, the backward pass twice the forward. Recomputed, padded or repeated
tokens do not count, whoever reads them.
"""

import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_rl.config import RunConfig
from moe_rl.experiments.bench.result import check_counts, in_turn, table, write_result
from moe_rl.kernels.product import product
from moe_rl.policy.build import build_policy
from moe_rl.presets import preset
from moe_rl.run_folder.log import RunLog
from moe_rl.runtime.process import prepare_process
from moe_rl.runtime.seeding import generator
from moe_rl.tasks import Task, task_of
from moe_rl.training.cold_start import starting_policy
from moe_rl.training.trainer import Trainer

_PEAK_SIZES = (512, 1024, 2048)
_ON, _OFF, _ENGINE = "moe-rl, instruments on", "moe-rl, instruments off", "moe-rl, no old pass"
_OURS: dict[str, dict[str, Any]] = {
    _ON: {},
    _OFF: {"instruments": False},
    # Engine and trainer are one program here, so that the engine's log-probs are the old ones.
    _ENGINE: {"old_logprobs": "rollout"},
}
_WARM_UP = 1


@dataclass(frozen=True, kw_only=True)
class UsefulOperations:
    """Useful floating-point operations of one rollout step."""

    rollout: float
    old_logprobs: float
    updates: float

    @property
    def total(self) -> float:
        """All three."""
        return self.rollout + self.old_logprobs + self.updates


def useful_operations(config: RunConfig, task: Task) -> UsefulOperations:
    """Operations of one rollout step whose responses have full length.

    One read of a token costs 2 operations for each active matrix weight, and attention 4 * width a
    layer for each position it sees. The output head is applied to each predicted token.
    """
    model, width = config.model, config.model.hidden_size
    experts = 3 * model.experts_per_token * width * model.expert_size
    weights = model.num_layers * (4 * width * width + model.num_experts * width + experts)
    vocabulary = len(task.alphabet) + 2
    prompts, sequences = config.prompts_per_rollout, config.prompts_per_rollout * config.group_size
    prompt, response = task.max_prompt_tokens, task.max_response_tokens
    read = response - 1  # the last token is never fed back
    tokens = prompts * prompt + sequences * read
    seen = prompts * prompt * (prompt + 1) / 2
    seen += sequences * (read * prompt + read * (read + 1) / 2)
    forward = 2.0 * weights * tokens + 4.0 * width * model.num_layers * seen
    forward += 2.0 * width * vocabulary * sequences * response
    return UsefulOperations(rollout=forward, old_logprobs=forward, updates=3 * forward)


def matmul_peak(multiply: Callable[[Tensor, Tensor], Tensor] = torch.mm) -> float:
    """The best fp32 matmul rate of `multiply` at the current threads, operations per second."""
    best = 0.0
    for size in _PEAK_SIZES:
        a, b = torch.randn(size, size), torch.randn(size, size)
        for _ in range(8):
            start = time.perf_counter()
            multiply(a, b)
            best = max(best, 2.0 * size**3 / (time.perf_counter() - start))
    return best


def bench_training(*, repeats: int, out: Path | None) -> int:
    """Run the race, print the table, write JSON; returns the exit code."""
    check_counts(repeats=repeats)
    config = preset("mild-stale").replace(steps=10_000, learning_rate=1e-5, device="cpu")
    prepare_process(config.num_threads)
    task = task_of(config.task)
    with tempfile.TemporaryDirectory() as scratch:
        cache = Path(scratch) / "cold_start"
        trainers = {
            name: _ours(config.replace(**changes), task, Path(scratch) / str(i), cache)
            for i, (name, changes) in enumerate(_OURS.items())
        }
        peaks = {"torch.mm": matmul_peak(), "product": matmul_peak(product)}
        seconds, absent = _race(config, task, trainers, repeats, Path(scratch), cache)
    result = _summarise(config, task, seconds, peaks, absent)
    print(_table(result))
    write_result(result, out)
    return 0


def _ours(config: RunConfig, task: Task, folder: Path, cache: Path) -> Trainer:
    policy = starting_policy(config, task, cache)
    return Trainer(config, policy, task, RunLog(folder, config))


def _race(
    config: RunConfig,
    task: Task,
    trainers: dict[str, Trainer],
    repeats: int,
    scratch: Path,
    cache: Path,
) -> tuple[dict[str, list[float]], str | None]:
    """Seconds of each rollout step of each contestant, and why TRL is absent if it is."""
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    steps = iter(range(10_000))

    def our_turn() -> None:
        step = next(steps)
        # Whoever follows TRL finds the caches full of its data: each goes first in turn.
        for name in in_turn(trainers, step):
            start = time.perf_counter()
            trainers[name].step(step)
            if step >= _WARM_UP:
                seconds[name].append(time.perf_counter() - start)

    try:
        import trl
    except ImportError:
        for _ in range(repeats + _WARM_UP):
            our_turn()
        return seconds, "TRL is not installed: pip install 'moe-rl[bench]'"
    name = f"TRL {trl.__version__}"
    folder = next(path for path in cache.iterdir() if path.is_dir())
    peer = _trl_trainer(config, task, folder, scratch, repeats + _WARM_UP)
    seconds[name] = []
    peer.add_callback(_boundary_callback(config, seconds[name], our_turn))
    peer.train()
    del seconds[name][:_WARM_UP]
    return seconds, None


def _boundary_callback(config: RunConfig, seconds: list[float], our_turn: Any) -> Any:
    """Takes TRL's time from one rollout to the next, and gives us our turn in between."""
    from transformers import TrainerCallback

    class Boundary(TrainerCallback):
        start = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **__: Any) -> None:
            if state.global_step % config.updates_per_rollout:
                return
            seconds.append(time.perf_counter() - self.start)
            our_turn()
            self.start = time.perf_counter()

    return Boundary()


def _trl_trainer(
    config: RunConfig, task: Task, cold_start: Path, scratch: Path, rollouts: int
) -> Any:
    """TRL's GRPOTrainer on the cold-started model, set to the same work."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    model_config = dataclasses.replace(
        config.model, checkpoint=str(cold_start), experts_implementation="grouped_mm"
    )
    policy = build_policy(model_config, task.alphabet, fuse=False)
    problems = task.prompts(generator(0, "bench"), config.prompts_per_rollout * rollouts)
    rows = [{"prompt": problem.prompt, **problem.columns} for problem in problems]
    sequences = config.prompts_per_rollout * config.group_size
    arguments = GRPOConfig(
        output_dir=str(scratch / "trl"),
        per_device_train_batch_size=sequences // config.updates_per_rollout,
        steps_per_generation=config.updates_per_rollout,
        num_generations=config.group_size,
        max_completion_length=task.max_response_tokens,
        max_steps=config.updates_per_rollout * rollouts,
        learning_rate=config.learning_rate,
        temperature=config.temperature,
        epsilon=0.2,
        epsilon_high=0.27,
        loss_type="grpo",
        beta=0.0,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        columns = {key: columns[key] for key in problems[0].columns}
        return task.reward(prompts, completions, **columns)

    return GRPOTrainer(
        model=policy.model,
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=policy.tokenizer,
    )


def _summarise(
    config: RunConfig,
    task: Task,
    seconds: dict[str, list[float]],
    peaks: dict[str, float],
    absent: str | None,
) -> dict[str, Any]:
    work = useful_operations(config, task)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    on, off = medians[_ON], medians[_OFF]
    useful = {
        name: work.total - (work.old_logprobs if name == _ENGINE else 0.0) for name in medians
    }
    peers = {name: value for name, value in medians.items() if name.startswith("TRL")}
    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "sequences": config.prompts_per_rollout * config.group_size,
        "updates_per_rollout": config.updates_per_rollout,
        "useful_operations": dataclasses.asdict(work) | {"total": work.total},
        "matmul_peak": peaks["torch.mm"],
        "fastest_matmul_peak": peaks["product"],
        "seconds": {name: sorted(values) for name, values in seconds.items()},
        "median_seconds": medians,
        "share_of_peak": {
            name: useful[name] / value / peaks["torch.mm"] for name, value in medians.items()
        },
        "speed_against_trl": {name: value / on for name, value in peers.items()},
        "instruments_share": (on - off) / on,
        "absent": absent,
        "config": json.loads(json.dumps(config.to_dict())),
    }


def _table(result: dict[str, Any]) -> str:
    peak = result["matmul_peak"]
    rows = [["", "s a rollout step", "useful GFLOP/s", "share of peak"]]
    for name, value in result["median_seconds"].items():
        share = result["share_of_peak"][name]
        rows.append([name, f"{value:.3f}", f"{share * peak / 1e9:.1f}", f"{share:.1%}"])
    lines = [table(rows)]
    lines.append(
        f"matmul peak of this machine: {peak / 1e9:.1f} GFLOP/s by torch.mm, of which the shares "
        f"are; {result['fastest_matmul_peak'] / 1e9:.1f} by the fastest library (see moe-rl doctor)"
    )
    for name, value in result["speed_against_trl"].items():
        lines.append(f"moe-rl with instruments is {value:.2f} times as fast as {name}")
    lines.append(f"instruments take {result['instruments_share']:.1%} of our training time")
    if result["absent"]:
        lines.append(result["absent"])
    return "\n".join(lines)
