"""What a second process gains: the study's model on one process and on two, one thread each.

    moe-rl bench ranks --out results/bench-ranks.json

Short runs of `moe-rl train` from one cold start; the time of a run is the median of its rollout
steps but the first two. Beside one process and two that train together stand two runs of half the
prompts each that know nothing of each other: what this machine's second core gives where nothing is
exchanged. The sides take turns, ratios are of runs of one turn. All of it three times: with the
study's updates, and with fewer of more prompts each, which exchange less often.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_rl.config import ConfigError, RunConfig
from moe_rl.experiments.bench.result import check_counts, in_turn, table, write_result
from moe_rl.experiments.executors.job import train_words
from moe_rl.presets import preset
from moe_rl.run_folder.log import write_config
from moe_rl.runtime.cores import cores
from moe_rl.runtime.process import cpu_name
from moe_rl.training.cold_start import prepare_cold_starts

_UPDATES = (8, 2, 1)  # of a rollout of 32 prompts; 8 are the study's
_STEPS = 8
_WARM_UP = 2
_TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


@dataclass(frozen=True)
class Side:
    """One way to take a rollout step's prompts.

    Args:
        share: 1 over the prompts of each run.
        launcher: words between `python` and the run.
        runs: how many are made at once.
    """

    share: int = 1
    launcher: tuple[str, ...] = ()
    runs: int = 1


SIDES = {
    "one process": Side(),
    "two processes": Side(launcher=_TORCHRUN),
    "two runs of half each": Side(share=2, runs=2),
}
_ALONE = "one process"


def bench_ranks(*, repeats: int, out: Path | None) -> int:
    """Run the race, print the table, write JSON; returns the exit code.

    Raises:
        ConfigError: fewer than one repetition, or fewer than two cores.
    """
    check_counts(repeats=repeats)
    if cores() == 1:
        raise ConfigError("bench ranks: one core here; two processes need two")
    # A learning rate that hardly moves the policy: responses keep their length.
    config = preset("mild-stale").replace(steps=_STEPS, learning_rate=1e-6, device="cpu")
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        prepare_cold_starts([config], root / "cold")
        cases = []
        for updates in _UPDATES:
            case = _race(config.replace(updates_per_rollout=updates), repeats, root)
            print(_table(case), end="\n\n", flush=True)
            cases.append(case)
    write_result({"device": cpu_name(), "torch": torch.__version__, "cases": cases}, out)
    return 0


def _race(config: RunConfig, repeats: int, root: Path) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    for number in range(repeats):
        for name in in_turn(SIDES, number):
            folder = root / f"{config.updates_per_rollout}-{name}-{number}"
            seconds[name].append(_step_seconds(SIDES[name], config, folder))
    gains = {
        name: [one / other for one, other in zip(seconds[_ALONE], values, strict=True)]
        for name, values in seconds.items()
        if name != _ALONE
    }
    return {
        "updates_per_rollout": config.updates_per_rollout,
        "prompts_per_update": config.prompts_per_rollout // config.updates_per_rollout,
        "seconds_a_step": seconds,
        "gain": {name: statistics.median(values) for name, values in gains.items()},
        "gains": gains,
        "config": config.to_dict(),
    }


def _table(case: dict[str, Any]) -> str:
    rows = [[f"{case['prompts_per_update']} prompts an update", "s a step", "gain", "range"]]
    for name, values in case["seconds_a_step"].items():
        gains = case["gains"].get(name)
        gain = (
            ["", ""]
            if gains is None
            else [f"{case['gain'][name]:.2f}", f"{min(gains):.2f} to {max(gains):.2f}"]
        )
        rows.append([name, f"{statistics.median(values):.3f}", *gain])
    return table(rows)


def _step_seconds(side: Side, config: RunConfig, folder: Path) -> float:
    """Seconds of a rollout step; of the slower run where there are two."""
    part = config.replace(prompts_per_rollout=config.prompts_per_rollout // side.share)
    folder.mkdir()
    write_config(folder / "config.json", part)
    cold, runs = folder.parent / "cold", [folder / str(number) for number in range(side.runs)]
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                *side.launcher,
                "-m",
                "moe_rl",
                *train_words(folder / "config.json", run, cold),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for run in runs
    ]
    errors = [process.communicate()[1] for process in processes]
    for process, said in zip(processes, errors, strict=True):
        if process.returncode:
            raise RuntimeError(
                f"bench ranks: a run ended with exit code {process.returncode}\n{said}"
            )
    return max(_median_step(run) for run in runs)


def _median_step(run: Path) -> float:
    lines = (run / "steps.jsonl").read_text(encoding="utf-8").splitlines()
    return statistics.median(json.loads(line)["seconds"] for line in lines[_WARM_UP:])
