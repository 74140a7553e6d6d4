"""The command line as a user meets it: real processes, exit codes, one clear message."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import moe_rl

TINY = ["--preset", "tiny", "--steps", "1", "--sft-steps", "2"]
TRAIN_TINY = ["train", *TINY]


def test_train_writes_a_complete_run_and_knows_it_again(tmp_path: Path) -> None:
    done = moe_rl("train", *TINY, "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "reward" in done.stdout
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["complete"] is True
    again = moe_rl("train", *TINY, "--out", "run", cwd=tmp_path)
    assert again.returncode == 0
    assert "complete already" in again.stdout
    config = str(tmp_path / "run" / "config.json")
    copy = moe_rl("train", "--config", config, "--out", "copy", cwd=tmp_path)
    assert copy.returncode == 0, copy.stderr
    first, second = (
        [json.loads(line)["loss"] for line in (tmp_path / n / "updates.jsonl").open()]
        for n in ("run", "copy")
    )
    assert first == second


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "usage: moe-rl"),
        (["trian"], "did you mean 'train'?"),
        (["train", "--algoritm", "gspo"], "--algorithm"),
        (["train", "--learning-rat", "1"], "--learning-rate"),
        (["train", "--preset", "tinny"], "did you mean 'tiny'?"),
        (["train", "--experts-per-token", "99"], "rl: experts_per_token=99 with num_experts=32"),
        (["train", "--learning-rate", "fast"], "'fast'"),
        (["train", "--learning-rate", "nan"], "learning_rate=nan: must be a positive number"),
        (["train", "--learning-rate"], "--learning-rate"),
        (["report", "a", "b"], "unexpected argument b"),
        (["train", "--arm", "$x_{"], "use a word of letters"),
        (["train", "--sft-steps", "-1"], "rl: sft_steps=-1: must be 0 or more"),
        (["train", "--setting", "../evil"], "without / or a leading dot"),
        (["train", "--temperature", "1e-320"], "from 1e-3 to 1e3"),
        (["train", "--router-noise", "1e38"], "from 0 to 1000"),
        ([*TRAIN_TINY, "--out", "a_file/run"], "a file is in the way (/"),
        ([*TRAIN_TINY, "--cold-start-cache", "a_file"], "cold_start_cache='a_file': a file is in"),
        ([*TRAIN_TINY, "--hidden-size", "400000"], "does not fit into memory"),
        (["reproduce", "--out", "a_file"], "out='a_file': a file is in the way"),
        (["map", "--out", "a_file/map"], "a file is in the way (/"),
        (["train", "--num-threads", "100000"], "at most 1024"),
        (["reproduce", "--settings", "deeper"], "add --full"),
        (["map", "--learning-rates", "1e-3", "1.0000000001e-3", "--dry-run"], "share it"),
        (["reproduce", "--full", "--settings", "stalenes"], "did you mean 'staleness'"),
        (["train", "--group-size", "1"], "group_size=1"),
        (["train", "--algorithm", "gspo", "--clip-low", "0.2"], "clip"),
        (["train", "--routing-replay", "R2", "--old-logprobs", "rollout"], "use R3"),
        (["train", "--checkpoint", "nowhere"], "no config.json there"),
        (["train", "--config", "nowhere.json"], "nowhere.json: cannot be read"),
        (["train", "--config", "a.json", "--preset", "tiny"], "choose one"),
        (["train", "--device", "cuda:99", "--preset", "tiny"], "cuda"),
        (["train", "--experts-implementation", "magic", "--preset", "tiny"], "magic"),
        (["report", "nowhere"], "nowhere"),
        (["report"], "RUN_DIR"),
        (["reproduce", "--quick", "--full"], "choose one"),
        (["reproduce", "--jobs", "0"], "jobs=0"),
        (["map", "--arms", "grpo", "nope"], "nope"),
        (["calibrate", "--share", "2", "--preset", "tiny"], "share=2.0"),
    ],
)
def test_bad_input_gets_a_message_and_exit_code_2(
    arguments: list[str], words: str, tmp_path: Path
) -> None:
    (tmp_path / "a_file").touch()
    result = moe_rl(*arguments, cwd=tmp_path)
    shown = result.stdout + result.stderr
    assert result.returncode == 2, shown
    assert words in shown
    if arguments:
        assert result.stderr.count("\n") == 1, "one clear line"
        assert not result.stdout
    assert not (tmp_path / "runs" / "collapse-quick").exists(), "work began before the check"


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--learning-rate", "not finite; the run has diverged at"),
        ("--sft-learning-rate", "cold start"),
    ],
)
def test_a_run_that_diverges_ends_with_one_line(option: str, words: str, tmp_path: Path) -> None:
    arguments = ["--preset", "tiny", "--warmup-steps", "0", option, "1e30", "--out", "run"]
    result = moe_rl("train", *arguments, cwd=tmp_path)
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert "moe-rl: " in last and words in last and f"{option[2:].replace('-', '_')}=1e+30" in last
    assert "Traceback" not in result.stderr


def test_a_run_folder_of_another_config_is_refused_and_kept(tmp_path: Path) -> None:
    moe_rl("train", *TINY, "--out", "run", cwd=tmp_path)
    before = (tmp_path / "run" / "steps.jsonl").read_bytes()
    other = moe_rl("train", *TINY, "--seed", "5", "--out", "run", cwd=tmp_path)
    assert other.returncode == 2
    assert "seed=0, this one has 5" in other.stderr
    assert (tmp_path / "run" / "steps.jsonl").read_bytes() == before


def test_a_damaged_cold_start_is_made_again(tmp_path: Path) -> None:
    """Truncated, or one bit flipped: the cache repairs itself, and the run is the same."""
    assert moe_rl("train", *TINY, "--out", "whole", cwd=tmp_path).returncode == 0
    (weights,) = (tmp_path / "runs" / "cold_start").glob("*/model.safetensors")
    good = weights.read_bytes()
    for name, bad in (
        ("truncated", good[: len(good) // 2]),
        ("flipped", good[:-1] + bytes([good[-1] ^ 1])),
    ):
        weights.write_bytes(bad)
        again = moe_rl("train", *TINY, "--out", name, cwd=tmp_path)
        assert again.returncode == 0, again.stderr
        assert weights.read_bytes() == good
        first, second = (
            json.loads((tmp_path / run / "steps.jsonl").read_text())["reward"]
            for run in ("whole", name)
        )
        assert first == second


def test_a_warning_is_one_line_about_a_file(tmp_path: Path) -> None:
    assert moe_rl("train", *TINY, "--out", "runs/run", cwd=tmp_path).returncode == 0
    with (tmp_path / "runs" / "run" / "steps.jsonl").open("a") as file:
        file.write('{"step": 1, "rew')
    result = moe_rl("report", "runs/run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("moe-rl: ") and "torn last line skipped" in line


def test_a_folder_of_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("precious")
    result = moe_rl("train", *TINY, "--out", "thesis", cwd=tmp_path)
    assert result.returncode == 2
    assert "no run" in result.stderr
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "precious"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_a_full_disk_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    os.symlink("/dev/full", tmp_path / "run" / "steps.jsonl")
    moe_rl("train", *TINY, "--out", "made", cwd=tmp_path)
    (tmp_path / "run" / "config.json").write_bytes((tmp_path / "made/config.json").read_bytes())
    result = moe_rl("train", *TINY, "--out", "run", cwd=tmp_path)
    assert result.returncode == 2
    assert "disk is full" in result.stderr
    assert "Traceback" not in result.stderr


def test_dry_runs_print_and_write_nothing(tmp_path: Path) -> None:
    config = moe_rl("train", "--preset", "tiny", "--seed", "7", "--dry-run", cwd=tmp_path)
    assert json.loads(config.stdout)["seed"] == 7
    study = moe_rl("reproduce", "--full", "--dry-run", cwd=tmp_path)
    assert "frozen-router" in study.stdout
    assert list(tmp_path.iterdir()) == []


def test_help_names_units_and_ranges(tmp_path: Path) -> None:
    shown = moe_rl("train", "--help", cwd=tmp_path).stdout
    for option in (
        "--algorithm",
        "--routing-replay",
        "--learning-rate",
        "--group-size",
        "--updates-per-rollout",
        "--num-experts",
        "--experts-per-token",
        "--steps",
        "--seed",
        "--out",
        "--preset",
    ):
        assert option in shown
    assert "logit units" in shown


def test_doctor_says_which_backend_and_why(tmp_path: Path) -> None:
    shown = moe_rl("doctor", cwd=tmp_path).stdout
    assert "experts auto" in shown
    assert "torch" in shown
    assert re.search(r"^log-probs, V = 13 +reference: N \* V = 13312 logits", shown, flags=re.M)
    assert re.search(r"^log-probs, V = 151936 +(chunked|triton): ", shown, flags=re.M)
    assert re.search(r"^routing statistics +(reference|triton): ", shown, flags=re.M)


def test_calibrate_finds_the_noise(tmp_path: Path) -> None:
    result = moe_rl(
        "calibrate", "--preset", "tiny", "--sft-steps", "2", "--share", "0.1", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    share = float(result.stdout.split(": ")[1].split("%")[0])
    assert share == pytest.approx(10.0, abs=1.5)


def test_an_interrupted_map_goes_on_where_it_stopped(tmp_path: Path) -> None:
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
    result = moe_rl(*command, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "complete already" in result.stdout
    assert len(list(tmp_path.glob("map/runs/*/*/*/summary.json"))) == 4
    assert all(path.stat().st_mtime_ns == at for path, at in finished.items())
    assert (tmp_path / "map" / "report" / "index.html").is_file()
