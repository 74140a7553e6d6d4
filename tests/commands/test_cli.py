"""The command line as a user meets it: real processes, exit codes, one clear message."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import Here, moe_rl

from moe_rl.config import RunConfig

TINY = ["--preset", "tiny", "--steps", "1", "--sft-steps", "2"]


def test_train_writes_a_complete_run_and_knows_it_again(tmp_path: Path, here: Here) -> None:
    done = moe_rl("train", *TINY, "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "reward" in done.stdout
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["complete"] is True
    again = here("train", *TINY, "--out", "run")
    assert again.returncode == 0
    assert "complete already" in again.stdout
    config = str(tmp_path / "run" / "config.json")
    copy = here("train", "--config", config, "--out", "copy")
    assert copy.returncode == 0, copy.stderr
    first, second = (
        [json.loads(line)["loss"] for line in (tmp_path / n / "updates.jsonl").open()]
        for n in ("run", "copy")
    )
    assert first == second


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Missing subcommand"),
        (["report"], "RUN_DIR"),
        (["report", "a", "b"], "Unrecognized options: b"),
        (["train", "--learning-rate"], "--learning-rate"),
        (["train", "--config", "a.json", "--preset", "tiny"], "are not allowed together"),
        (["train", "--experts-per-token", "99"], "experts_per_token=99 with num_experts=32"),
        (["train", "--algorithm", "gspo", "--clip-low", "0.2"], "clip"),
        (["train", "--device", "cuda:99", "--preset", "tiny"], "cuda"),
        (["train", "--experts", "magic", "--preset", "tiny"], "magic"),
        (["train", *TINY, "--cold-start-cache", "a_file"], "cold_start_cache='a_file'"),
        (["train", *TINY, "--hidden-size", "400000"], "does not fit into memory"),
        (["study", "remedy"], "remedies"),
        (["reproduce", "--jobs", "0"], "jobs=0"),
        (["reproduce", "--arms"], "arms: none is given"),
        (["arms", "my_loss.py"], "give my_loss.py:FUNCTION"),
        (["study", "tolerance", "--seeds"], "seeds: none is given"),
        (["study", "tolerance", "--seeds", "99"], "use some of these"),
        (["reproduce", "--out", "a_file"], "out='a_file': a file is in the way"),
        (["map", "--arms", "grpo", "nope"], "nope"),
        (["map", "--learning-rates", "1e-3", "1.0000000001e-3", "--dry-run"], "asked for twice"),
        (["calibrate", "--share", "2", "--preset", "tiny"], "share=2.0"),
        (["churn", "empty.npz"], "TRACE_B"),
        (["churn", "a.npz", "b.npz", "--plot", "x.bmp"], "plot='x.bmp'"),
        (["check-replay"], "or --all"),
        (["check-replay", "--all", "qwen3_moe"], "or --all"),
        (["check-replay", "qwen3_mo"], "did you mean 'qwen3_moe'?"),
        (["check-replay", "phimoe"], "sparsemixer"),
        (["check-replay", "ernie4_5_vl_moe"], "no router sees every token"),
        (["check-replay", "empty.npz"], "empty.npz: "),
    ],
)
def test_bad_input_gets_a_message_and_exit_code_2(
    arguments: list[str], words: str, tmp_path: Path, here: Here
) -> None:
    (tmp_path / "a_file").touch()
    (tmp_path / "empty.npz").touch()
    done = here(*arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert words in done.stderr and not done.stdout
    assert done.stderr.startswith(("moe-rl: ", "\u256d")) and "Traceback" not in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"a_file", "empty.npz"}


def test_a_damaged_cold_start_is_made_again(tmp_path: Path, here: Here) -> None:
    """Truncated, or one bit flipped: the cache repairs itself, and the run is the same."""
    assert here("train", *TINY, "--out", "whole").returncode == 0
    (weights,) = (tmp_path / "runs" / "cold_start").glob("*/model.safetensors")
    good = weights.read_bytes()
    for name, bad in (
        ("truncated", good[: len(good) // 2]),
        ("flipped", good[:-1] + bytes([good[-1] ^ 1])),
    ):
        weights.write_bytes(bad)
        again = here("train", *TINY, "--out", name)
        assert again.returncode == 0, again.stderr
        assert weights.read_bytes() == good
        first, second = (
            json.loads((tmp_path / run / "steps.jsonl").read_text())["reward"]
            for run in ("whole", name)
        )
        assert first == second


def test_a_warning_is_one_line_about_a_file(tmp_path: Path, here: Here) -> None:
    assert here("train", *TINY, "--out", "runs/run").returncode == 0
    with (tmp_path / "runs" / "run" / "steps.jsonl").open("a") as file:
        file.write('{"step": 1, "rew')
    result = moe_rl("report", "runs/run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("moe-rl: ") and "torn last line skipped" in line


def test_dry_runs_print_and_write_nothing(tmp_path: Path, here: Here) -> None:
    config = here("train", "--preset", "tiny", "--seed", "7", "--dry-run")
    assert json.loads(config.stdout)["seed"] == 7
    study = here("study", "remedies", "--dry-run")
    assert "frozen-router" in study.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "--algorithm tis --old-logprobs rollout",
            "algorithm=tis with old_logprobs=rollout is GRPO",
        ),
        (
            "--algorithm rspo --num-experts 2",
            "algorithm=rspo on a dense model reads routers that never move",
        ),
        (
            "--routing-replay R2 --num-experts 2",
            "routing_replay=R2 on a dense model replays nothing",
        ),
        ("--algorithm tis", ""),
        ("--algorithm rspo", ""),
        ("--algorithm dual_clip --old-logprobs rollout", ""),
    ],
)
def test_a_method_that_changes_nothing_here_is_named(words: str, said: str, here: Here) -> None:
    done = here("train", *TINY, *words.split(), "--out", "run")
    assert done.returncode == 0
    assert done.stderr.startswith(f"moe-rl: {said}") if said else not done.stderr


def test_help_lists_every_setting(here: Here) -> None:
    shown = here("train", "--help").stdout
    names = re.findall(r'"(\w+)": (?!\{)', json.dumps(RunConfig().to_dict(), indent=1))
    on = {"instruments", "value_trains_policy"}
    options = [f"--{'no-' * (name in on)}{name.replace('_', '-')}" for name in names]
    assert [option for option in options if option not in shown] == []


def test_doctor_says_which_backend_and_why(here: Here) -> None:
    shown = here("doctor").stdout
    assert "experts auto" in shown
    assert "torch" in shown
    assert re.search(r"^log-probs, V = 13 +reference: N \* V = 13312 logits", shown, flags=re.M)
    assert re.search(r"^log-probs, V = 151936 +(chunked|triton): ", shown, flags=re.M)
    assert re.search(r"^routing statistics +(reference|triton): ", shown, flags=re.M)


def test_calibrate_finds_the_noise(here: Here) -> None:
    result = here("calibrate", "--preset", "tiny", "--sft-steps", "2", "--share", "0.1")
    assert result.returncode == 0, result.stderr
    share = float(result.stdout.split(": ")[1].split("%")[0])
    assert share == pytest.approx(10.0, abs=1.5)


@pytest.mark.slow
def test_an_interrupted_map_goes_on_where_it_stopped(tmp_path: Path, here: Here) -> None:
    command = ["map", "--preset", "tiny", "--out", "map", "--arms", "grpo", "gspo"]
    command += ["--learning-rates", "1e-3", "--updates", "4", "--noises", "0"]
    command += ["--seeds", "1", "2", "--jobs", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "moe_rl", *command],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # Whoever starts the tests in the background may have told us to ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not (done := list(tmp_path.glob("map/runs/*/*/*/summary.json"))):
        assert time.monotonic() < deadline, "no run finished in time"
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "finished runs are kept" in errors
    finished = {path: path.stat().st_mtime_ns for path in done}
    result = here(*command)
    assert result.returncode == 0, result.stderr
    assert "complete already" in result.stdout
    assert len(list(tmp_path.glob("map/runs/*/*/*/summary.json"))) == 4
    assert all(path.stat().st_mtime_ns == at for path, at in finished.items())
    assert (tmp_path / "map" / "report" / "index.html").is_file()
