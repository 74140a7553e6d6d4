"""SIGTERM, Ctrl-C and SIGKILL: what they leave behind, through the real command."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import assert_same_run
from runtime import ranks

from moe_rl.commands.cli import main
from moe_rl.experiments.bench.soak import differences, race
from moe_rl.presets import preset

_SECONDS = 120
_STEPS = 24


def command(folder: Path, *more: str) -> list[str]:
    return [
        *("-m", "moe_rl", "train", "--preset", "tiny", "--steps", str(_STEPS)),
        *("--save-every", str(_STEPS), "--cold-start-cache", str(folder.parent / "cold")),
        *("--out", str(folder), *more),
    ]


def start(arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
        # A parent that ignores Ctrl-C, as a shell's background does, would have passed that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def wait_for_lines(folder: Path, count: int) -> None:
    """Until the run has made so many updates."""
    log, deadline = folder / "updates.jsonl", time.monotonic() + _SECONDS
    while time.monotonic() < deadline:
        lines = log.read_bytes().splitlines() if log.is_file() else []
        if len(lines) >= count:
            return
        time.sleep(0.02)
    raise AssertionError(f"{folder}: no {count} updates in {_SECONDS} s")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("signals") / "whole"
    assert main(command(folder)[2:]) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_step_and_the_resumed_run_is_bitwise_the_same(
    number: signal.Signals, code: int, whole: Path
) -> None:
    folder = whole.parent / number.name
    process = start(command(folder))
    wait_for_lines(folder, 6)
    process.send_signal(number)
    _, errors = process.communicate(timeout=_SECONDS)
    assert process.returncode == code, errors
    assert f"{number.name}: this rollout step ends first" in errors
    assert (
        "the same command with --resume continues from it" in errors and "Traceback" not in errors
    )
    latest = (folder / "checkpoints" / "latest").read_text().strip()
    assert f"checkpoint: {folder / 'checkpoints' / latest}" in errors
    before = len((folder / "updates.jsonl").read_text().splitlines())
    assert int(latest) * 4 == before < _STEPS * 4, "the step was ended, no other begun"
    assert main(command(folder, "--resume")[2:]) == 0
    assert_same_run(folder, whole)


@pytest.mark.slow
def test_a_run_killed_at_random_moments_is_bitwise_the_same(tmp_path: Path) -> None:
    """The soak of experiments/bench/soak.py, for a minute."""
    config = preset("tiny").replace(steps=20, save_every=20, checkpoint_every=1, seed=3).named()
    kills = race(config, tmp_path, tmp_path / "cold", updates_per_life=40)
    assert kills >= 2
    assert differences(tmp_path / "killed", tmp_path / "undisturbed") == []
    assert_same_run(tmp_path / "killed", tmp_path / "undisturbed")


@pytest.mark.slow
def test_a_run_that_nobody_reads_any_more_fails(whole: Path) -> None:
    """`moe-rl train | head -n 1`, or a `tee` that has died: no run that is complete."""
    folder = whole.parent / "unread"
    process = start(command(folder))
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=_SECONDS) == 141
    said = process.stderr.read()
    assert "moe-rl: nobody reads the output any more; the same command" in said
    assert "Traceback" not in said and not (folder / "summary.json").exists()
    words = shlex.join([sys.executable, *command(whole.parent / "unread too")])
    done = subprocess.run(
        ["bash", "-c", f"( {words} 2>&1; echo $? >&3 ) 3>&2 | head -n 1"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == "141\n"


_LISTEN = """
import os, signal, sys, time
from moe_rl.runtime.stopping import listen
with listen() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(float(sys.argv[1]))
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.2)
print("went on", stop.number)
"""


@pytest.mark.parametrize(("pause", "code", "said"), [(0.1, 0, "went on 15\n"), (1.2, -15, "")])
def test_a_second_signal_leaves_at_once_but_not_one_that_comes_twice(
    pause: float, code: int, said: str
) -> None:
    """Ctrl-C reaches a process of torchrun from the terminal and from torchrun."""
    process = start(["-c", _LISTEN, str(pause)])
    out, _ = process.communicate(timeout=_SECONDS)
    assert (process.returncode, out) == (code, said)


@pytest.mark.distributed
@pytest.mark.slow
def test_a_signal_to_one_rank_stops_both(whole: Path) -> None:
    """Through torchrun, which gives its own exit code."""
    folder = whole.parent / "ranks"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [*torchrun, *command(folder)]
    process = start(arguments, OMP_NUM_THREADS="1")
    wait_for_lines(folder, 6)
    children = subprocess.run(
        ["pgrep", "-f", f"moe_rl train.*{folder}"], capture_output=True, text=True, check=True
    ).stdout.split()
    pids = [int(pid) for pid in children if int(pid) != process.pid]
    assert len(pids) == 2
    os.kill(pids[1], signal.SIGTERM)
    _, errors = process.communicate(timeout=_SECONDS)
    assert process.returncode == 1
    assert errors.count("the same command with --resume continues from it") == 2
    assert (folder / "checkpoints" / "latest").is_file()
    resumed = subprocess.run(
        [sys.executable, *arguments, "--resume"], capture_output=True, text=True, check=True
    )
    assert resumed.stdout.count("final reward") == 1
    assert (folder / f"policy_{_STEPS:05d}" / "model.safetensors").is_file()


@pytest.mark.distributed
def test_a_rank_that_is_killed_ends_the_other_with_one_line(whole: Path) -> None:
    folder = whole.parent / "lost"
    both = ranks.start(command(folder), 2)
    wait_for_lines(folder, 6)
    both[1].kill()
    both[1].communicate()
    _, errors = both[0].communicate(timeout=_SECONDS)
    assert both[0].returncode == 1
    assert "moe-rl: another process of this training is gone" in errors
    assert "Traceback" not in errors
