"""What record and replay add to a training step, on the study's model and on a deep one.

    moe-rl bench routing --out results/bench-routing.json

A step is one update of a rollout: forward, loss, backward, clipped AdamW step. The same step is
taken plain, while the experts' choice is recorded, and while a recorded choice is replayed, in turn
and each first as often as the others; an overhead is the median of the rounds' ratios.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moe_rl.batch import RolloutBatch
from moe_rl.config import RunConfig
from moe_rl.experiments.bench.result import check_counts, in_turn, write_result
from moe_rl.losses import aggregate, find_algorithm, make_inputs
from moe_rl.policy.build import build_policy
from moe_rl.policy.forward import ForwardOptions, response_pass
from moe_rl.policy.policy import Policy
from moe_rl.presets import preset
from moe_rl.rollout.cached import CachedEngine
from moe_rl.rollout.request import Request
from moe_rl.runtime.process import prepare_process
from moe_rl.runtime.seeding import generator
from moe_rl.tasks import task_of
from moe_rl.training.learner import loss_options

_LAYERS = (None, 16)  # None: as many as the study's model
_WARM_UP = 3
_BOUND = 0.03


def bench_routing(*, repeats: int, out: Path | None) -> int:
    """Run the race, print the table, write JSON; returns the exit code.

    Raises:
        ConfigError: fewer than one repetition.
    """
    check_counts(repeats=repeats)
    base = preset("mild-stale")
    prepare_process(base.num_threads)
    cases = []
    for layers in _LAYERS:
        config = base if layers is None else base.replace(num_layers=layers)
        cases.append(_case(config, repeats))
        print(_line(cases[-1]), flush=True)
    write_result({"torch": torch.__version__, "threads": base.num_threads, "cases": cases}, out)
    return 0


def _case(config: RunConfig, repeats: int) -> dict[str, Any]:
    """Seconds of one update of the run, each way."""
    task = task_of(config.task)
    policy = build_policy(config.model, task.alphabet, seed=0)
    prompts = config.prompts_per_rollout // config.updates_per_rollout
    problems = task.prompts(generator(0, "bench"), prompts)
    request = Request(
        prompts=[problem.prompt for problem in problems],
        numbers=range(len(problems)),
        seed=0,
        purpose="bench",
        group_size=config.group_size,
        max_tokens=task.max_response_tokens,
    )
    batch = CachedEngine(policy).sample(request)
    ways = {
        "plain": ForwardOptions(record=False),
        "record": ForwardOptions(record=True),
        "replay": ForwardOptions(record=False, replay=batch.routed_experts),
    }
    step = _step(config, policy, batch)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(_WARM_UP + repeats):
        for name in in_turn(ways, number):
            start = time.perf_counter()
            step(ways[name])
            if number >= _WARM_UP:
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "num_layers": config.model.num_layers,
        "sequences": prompts * config.group_size,
        "median_seconds": medians,
        # Of each round by itself: what slows a round down slows down both.
        "overhead": {
            name: statistics.median(
                a / b for a, b in zip(seconds[name], seconds["plain"], strict=True)
            )
            - 1
            for name in ("record", "replay")
        },
        "config": dataclasses.asdict(config),
    }


def _step(
    config: RunConfig, policy: Policy, batch: RolloutBatch
) -> Callable[[ForwardOptions], None]:
    """One update along random advantages."""
    parameters = [*policy.model.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-8, fused=True)
    algorithm = find_algorithm(config.algorithm)
    chosen = loss_options(config, algorithm)
    advantages = torch.randn(len(batch.response_ids), generator=torch.Generator().manual_seed(0))

    def step(options: ForwardOptions) -> None:
        output = response_pass(policy, batch, options)
        inputs = make_inputs(
            output.logprobs, batch.rollout_logprobs, advantages, batch.response_mask
        )
        aggregate(algorithm.loss(inputs, **chosen), inputs, algorithm.aggregation).backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _line(case: dict[str, Any]) -> str:
    plain = case["median_seconds"]["plain"]
    record, replay = case["overhead"]["record"], case["overhead"]["replay"]
    return (
        f"{case['num_layers']:>3} layers: {1000 * plain:.1f} ms an update; record {record:+.1%}, "
        f"replay {replay:+.1%} (wanted: at most {_BOUND:+.0%} each)"
    )
