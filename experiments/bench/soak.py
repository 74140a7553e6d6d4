"""A run that is killed again and again ends as one that nothing disturbs, bit for bit.

    moe-rl soak --minutes 30

Two runs of one config side by side. One is killed by SIGKILL after a random time of 60 to 90 s and
started again with --resume, until it is complete; then weights and logs of both are compared.
"""

import contextlib
import json
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load_file

from moe_rl.config import ConfigError, RunConfig, preset
from moe_rl.experiments.runner import train_words
from moe_rl.run_folder.checkpoints import LATEST
from moe_rl.run_folder.log import check_can_be_made, is_complete, write_config
from moe_rl.runtime.seeding import generator
from moe_rl.training.cold_start import prepare_cold_starts

_CHECKPOINT_EVERY = 3
_PACE_STEPS = 3
_IN_VAIN = 3  # kills in a row without a new checkpoint


def soak(
    *, minutes: float, shortest: float, longest: float, seed: int, out: Path, cold_start_cache: Path
) -> int:
    """Run both, compare; returns the exit code, 1 if they differ.

    Args:
        minutes: about how long the killed run is to last.
        shortest, longest: seconds between two kills.
        seed: of the times of the kills, and of the runs.
        out: folder of both runs and of soak.log.
        cold_start_cache: folder of all cold starts.

    Raises:
        ConfigError: an option that cannot work, or a folder that is in use.
    """
    if minutes <= 0 or not 0 < shortest <= longest:
        raise ConfigError(
            f"minutes={minutes}, shortest={shortest}, longest={longest}: give positive times, the "
            "shortest no longer than the longest"
        )
    check_can_be_made(out, "out")
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"out={str(out)!r}: not empty; give a new folder")
    out.mkdir(parents=True, exist_ok=True)
    config = preset("engine-noise").replace(
        algorithm="gspo", routing_replay="R3", seed=seed, checkpoint_every=_CHECKPOINT_EVERY
    )
    prepare_cold_starts([config], cold_start_cache)
    with (out / "soak.log").open("w", encoding="utf-8") as file:
        log = _Log(file)
        per_step = _seconds_per_step(config, out, cold_start_cache)
        steps = max(2, round(60 * minutes / per_step))
        log.say(
            f"a rollout step takes {per_step:.1f} s: {steps} of them, a checkpoint every "
            f"{_CHECKPOINT_EVERY} updates, SIGKILL after {shortest:g} to {longest:g} s"
        )
        config = config.replace(steps=steps, save_every=steps).named()
        return _race(config, out, cold_start_cache, (shortest, longest), log)


class _Log:
    """Lines with the time since the start, in the file and on the screen."""

    def __init__(self, file: IO[str]) -> None:
        self._file, self._start = file, time.monotonic()

    def say(self, message: str) -> None:
        line = f"{time.monotonic() - self._start:7.1f} s  {message}"
        print(line, flush=True)
        self._file.write(line + "\n")
        self._file.flush()


def _seconds_per_step(config: RunConfig, out: Path, cache: Path) -> float:
    """From a short run of the same config."""
    folder = out / "pace"
    write_config(out / "config.json", config.replace(steps=_PACE_STEPS))
    if _start(out, "pace", cache).wait() != 0:
        raise ConfigError(f"the run does not start: see {out / 'pace.txt'}")
    lines = (folder / "steps.jsonl").read_text(encoding="utf-8").splitlines()
    return statistics.median(json.loads(line)["seconds"] for line in lines)


def _race(
    config: RunConfig,
    out: Path,
    cache: Path,
    between: tuple[float, float],
    log: _Log,
) -> int:
    write_config(out / "config.json", config)
    whole = _start(out, "undisturbed", cache)
    draws = generator(config.seed, "soak")
    kills, in_vain, reached = 0, 0, ""
    try:
        while not is_complete(out / "killed"):
            process = _start(out, "killed", cache)
            pause = draws.uniform(*between)
            try:
                code = process.wait(timeout=pause)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills, before, reached = kills + 1, reached, _latest(out / "killed")
                log.say(f"kill {kills} after {pause:.0f} s: {_standing(out / 'killed', reached)}")
                in_vain = in_vain + 1 if reached == before else 0
                if in_vain == _IN_VAIN:
                    log.say("failed: the kills come faster than checkpoints, give longer times")
                    return 1
                continue
            if code != 0:
                log.say(f"failed: exit code {code}, see {out / 'killed.txt'}")
                return 1
        log.say(f"complete after {kills} kills")
        if whole.wait() != 0:
            log.say(f"failed: the undisturbed run, see {out / 'undisturbed.txt'}")
            return 1
    finally:
        with contextlib.suppress(ProcessLookupError):
            whole.kill()
    return _compare(out, config.steps, log)


def _start(out: Path, name: str, cache: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, *train_words(out / "config.json", out / name, cache)]
    with (out / f"{name}.txt").open("a", encoding="utf-8") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)


def _latest(folder: Path) -> str:
    """Name of the checkpoint that a killed run will go on from; empty: it has none."""
    try:
        return (folder / "checkpoints" / LATEST).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return ""


def _standing(folder: Path, checkpoint: str) -> str:
    if not checkpoint:
        return "no checkpoint yet"
    lines = (folder / "updates.jsonl").read_bytes().splitlines()
    return f"checkpoint {checkpoint}, {len(lines)} updates logged"


def _compare(out: Path, steps: int, log: _Log) -> int:
    """0 if weights and logs of both runs are equal."""
    runs = [out / "undisturbed", out / "killed"]
    weights = [load_file(run / f"policy_{steps:05d}" / "model.safetensors") for run in runs]
    differ = [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])]
    log.say(f"weights: {len(weights[0]) - len(differ)} of {len(weights[0])} tensors bitwise equal")
    same = not differ and weights[0].keys() == weights[1].keys()
    for name in ("steps.jsonl", "updates.jsonl"):
        ours, theirs = (_untimed(run / name) for run in runs)
        equal = sum(a == b for a, b in zip(ours, theirs, strict=False))
        log.say(f"{name}: {equal} of {len(ours)} lines equal but for times")
        same = same and ours == theirs
    log.say("passed" if same else "FAILED")
    return 0 if same else 1


def _untimed(file: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [{key: v for key, v in line.items() if "seconds" not in key} for line in lines]
