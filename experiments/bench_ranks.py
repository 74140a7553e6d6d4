"""What a second process gains: the study's model on one process and on two, one thread each.

    moe-rl bench ranks --out results/bench-ranks.json

Short runs of `moe-rl train` from one cold start, on one process and on two in turn; the time of a
run is the median of its rollout steps but the first two. Ratios are of runs that follow each other.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from moe_rl.cold_start import prepare_cold_starts
from moe_rl.config import ConfigError, preset
from moe_rl.experiments.bench_result import check_repeats, write_result
from moe_rl.experiments.runner import train_words
from moe_rl.options import cores
from moe_rl.runlog import write_config

_STEPS = 8
_WARM_UP = 2
_PROCESSES = (1, 2)


def bench_ranks(*, repeats: int, out: Path | None) -> int:
    """Run the race, print the table, write JSON; returns the exit code.

    Raises:
        ConfigError: fewer than one repetition, or fewer than two cores.
    """
    check_repeats(repeats)
    if cores() < max(_PROCESSES):
        raise ConfigError(f"bench ranks: {cores()} core here; two processes need two")
    # A learning rate that hardly moves the policy: responses keep their length.
    config = preset("staleness").replace(steps=_STEPS, learning_rate=1e-6, device="cpu")
    seconds: dict[int, list[float]] = {size: [] for size in _PROCESSES}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        write_config(root / "config.json", config)
        prepare_cold_starts([config], root / "cold")
        for number in range(repeats):
            for size in _PROCESSES[:: 1 if number % 2 == 0 else -1]:
                seconds[size].append(_run(root, size, number))
    gains = [one / two for one, two in zip(*seconds.values(), strict=True)]
    result: dict[str, Any] = {
        "torch": torch.__version__,
        "seconds_a_step": {str(size): values for size, values in seconds.items()},
        "gain": statistics.median(gains),
        "gains": gains,
        "config": config.to_dict(),
    }
    for size, values in seconds.items():
        print(f"{size} process(es), one thread each: {statistics.median(values):.3f} s a step")
    spread = f"{min(gains):.2f} to {max(gains):.2f}"
    print(f"two processes are {result['gain']:.2f} times as fast ({spread})")
    write_result(result, out)
    return 0


def _run(root: Path, size: int, number: int) -> float:
    """Seconds of a rollout step on `size` processes."""
    folder = root / f"{size}-{number}"
    launcher = [sys.executable]
    if size > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    command = [*launcher, *train_words(root / "config.json", folder, root / "cold")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    lines = (folder / "steps.jsonl").read_text(encoding="utf-8").splitlines()
    return statistics.median(json.loads(line)["seconds"] for line in lines[_WARM_UP:])
