"""Soak test: a run that SIGKILL ends again and again is bit for bit one that nothing disturbs.

    python -m moe_rl.experiments.bench.soak --minutes 30

Round after round, each with a seed of its own, a run is killed at random moments and resumed until
it is complete, beside an undisturbed run of the same config; then weights and logs are compared.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from moe_rl.config import RunConfig
from moe_rl.experiments.executors.job import train_words
from moe_rl.presets import preset
from moe_rl.run_folder.log import UPDATES, is_complete, write_config
from moe_rl.training.cold_start import prepare_cold_starts

LOGS = ("steps.jsonl", UPDATES)
_POLL_SECONDS = 0.05


def race(config: RunConfig, out: Path, cold_start_cache: Path, *, updates_per_life: int) -> int:
    """Run both, and return how often the killed one was killed.

    Args:
        config: the run; it must save its policy and write checkpoints.
        out: folder of both runs, `killed` and `undisturbed`.
        cold_start_cache: folder of all cold starts.
        updates_per_life: most updates that the killed run makes between two kills.

    Raises:
        RuntimeError: a run ended on its own before it was complete.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_config(out / "config.json", config)
    draws, kills = np.random.default_rng(config.seed), 0
    whole = _start(out, "undisturbed", cold_start_cache)
    try:
        while not is_complete(out / "killed"):
            target = _updates(out / "killed") + draws.integers(1, updates_per_life + 1)
            process = _start(out, "killed", cold_start_cache)
            while process.poll() is None and _updates(out / "killed") < target:
                time.sleep(_POLL_SECONDS)
            time.sleep(draws.uniform(0, 0.5))  # within an update, or while a checkpoint is written
            if process.poll() is None:
                process.kill()
                kills += 1
            elif process.returncode != 0:
                raise RuntimeError(f"exit code {process.returncode}: see {out / 'killed.txt'}")
            process.wait()
        if whole.wait() != 0:
            raise RuntimeError(f"exit code {whole.returncode}: see {out / 'undisturbed.txt'}")
    finally:
        whole.kill()
    return kills


def differences(ours: Path, theirs: Path) -> list[str]:
    """What differs between two runs: tensors of saved policies, and log lines but for times."""
    found = []
    for saved in sorted(theirs.glob("policy_*/model.safetensors")):
        path = saved.relative_to(theirs)
        weights, others = load_file(ours / path), load_file(saved)
        found += [f"{path}: {n}" for n in others if not torch.equal(weights[n], others[n])]
    for log in LOGS:
        if untimed(ours / log) != untimed(theirs / log):
            found.append(log)
    return found


def _start(out: Path, name: str, cache: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "moe_rl", *train_words(out / "config.json", out / name, cache)]
    with (out / f"{name}.txt").open("a", encoding="utf-8") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)


def _updates(run: Path) -> int:
    log = run / UPDATES
    return log.read_bytes().count(b"\n") if log.is_file() else 0


def untimed(file: Path) -> list[dict[str, Any]]:
    """The lines of a log without times."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [{key: v for key, v in line.items() if "seconds" not in key} for line in lines]


def main() -> int:
    """Run rounds for about `--minutes`; the exit code is 1 if runs differ."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="begin no round after these")
    parser.add_argument("--out", type=Path, default=Path("runs/soak"), help="folder of all rounds")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    base = preset("mild-noise").replace(algorithm="gspo", routing_replay="R3", checkpoint_every=1)
    base, cache = base.replace(save_every=base.steps).named(), options.out / "cold_start"
    prepare_cold_starts([base], cache)
    failed, seed = 0, 0
    while time.monotonic() < end:
        folder = options.out / f"seed{seed}"
        kills = race(base.replace(seed=seed), folder, cache, updates_per_life=400)
        found = differences(folder / "killed", folder / "undisturbed")
        print(f"seed {seed}: {kills} kills, {'; '.join(found) or 'bitwise equal'}", flush=True)
        failed, seed = failed + bool(found), seed + 1
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
