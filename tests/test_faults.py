"""Every row of docs/faults.md on the real command line: message, exit code, nothing left behind."""

import ctypes
import fcntl
import functools
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import moe_rl
from safetensors.numpy import load_file, save_file
from small_policy import small_policy
from transformers import LlamaConfig, LlamaForCausalLM

from moe_rl.commands.cli import main
from moe_rl.commands.messages import explain
from moe_rl.config import SCHEMA
from moe_rl.policy.tokenizer import tokenizer_of
from moe_rl.presets import preset

PAGE = Path(__file__).resolve().parents[1] / "docs" / "faults.md"
TINY = ("train", "--preset", "tiny", "--steps", "1", "--sft-steps", "2")
RUN = (*TINY, "--out", "run")


@dataclass(frozen=True)
class Fault:
    """How a row is tried."""

    command: tuple[str, ...]
    """Words after `moe-rl`, in a fresh folder."""
    given: Callable[[Path], object] = lambda folder: None
    """Puts the bad input into that folder; what it returns lives as long as the command."""
    writes: bool = False
    """Whether the command may write files, because it fails after a run has begun."""
    child: Callable[[], None] | None = None
    """Run the command in a process of its own, in which this is called first."""


def write(name: str, content: str | bytes) -> Callable[[Path], object]:
    raw = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(raw)


def bad_config(text: str) -> Fault:
    return Fault(("train", "--config", "bad.json"), write("bad.json", text))


def not_installed(package: str) -> Callable[[Path], object]:
    """While the returned patch lives, importing the package fails."""

    def given(folder: Path) -> pytest.MonkeyPatch:
        patch = pytest.MonkeyPatch()
        patch.setitem(sys.modules, package, None)
        return patch

    return given


OPTIONS = {
    "no such command": Fault(("trian",)),
    "no such option": Fault(("train", "--algoritm", "gspo")),
    "no such preset": Fault(("train", "--preset", "tinny")),
    "a value of another type": Fault(("train", "--steps", "many")),
    "a value out of range": Fault(("train", "--group-size", "1")),
    "options that exclude": Fault(
        ("train", "--old-passes", "8", "--old-logprobs", "rollout"),
    ),
    "an engine not installed": Fault((*RUN, "--engine", "vllm"), not_installed("vllm")),
    "a tracker not installed": Fault((*RUN, "--tracker", "wandb"), not_installed("wandb")),
    "a config that is not there": Fault(("train", "--config", "nowhere.json")),
    "a config that is not JSON": bad_config('{\n "steps": 3,,\n}'),
    "an unknown key": bad_config('{"model": {"num_expert": 4}}'),
    "a config value of no sense": bad_config('{"temperature": NaN}'),
    "another format version": bad_config(json.dumps({"schema": 99, "config": {}})),
}


LOSSES = """
def scalar(inputs): return inputs.logprobs.sum()
def still(inputs): return inputs.logprobs.detach()
def broken(inputs): return inputs.logprobs * float("nan")
"""


def own_loss(function: str) -> Fault:
    return Fault((*RUN, "--loss", f"own.py:{function}"), write("own.py", LOSSES))


ARMS = {
    "no such arm": Fault(("reproduce", "--arms", "grpo", "gsop")),
    "an own loss with an arm's name": Fault(("reproduce", "--arms", "own.py:gspo")),
    "no file of an own loss": Fault((*RUN, "--loss", "nowhere.py:f")),
    "no function of that name": own_loss("absent"),
    "one number instead of a token's": own_loss("scalar"),
    "a loss that has no gradient": own_loss("still"),
    "a loss that is NaN": own_loss("broken"),
}


def run_of(folder: Path, **changes: Any) -> Path:
    """run/ with the config of RUN."""
    config = preset("tiny").replace(**{"steps": 1, "sft_steps": 2} | changes).named()
    (folder / "run").mkdir()
    values = {"schema": SCHEMA, "config": config.to_dict()}
    (folder / "run" / "config.json").write_text(json.dumps(values))
    return folder / "run"


def thesis(folder: Path, **files: str) -> None:
    (folder / "thesis").mkdir()
    for name, text in ({"chapter1.tex": "precious"} | files).items():
        (folder / "thesis" / name).write_text(text)


def bound_by_permissions() -> None:
    """Take from root the power to write where permissions say no; others never had it."""
    cap_dac_override, pr_capbset_drop = 1, 24
    if os.geteuid() == 0:
        ctypes.CDLL(None).prctl(pr_capbset_drop, cap_dac_override, 0, 0, 0)


def in_use(folder: Path) -> Any:
    file = (run_of(folder) / "lock").open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def small_files() -> None:
    """No file may exceed 20 kB, which is what a full disk looks like."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def torn_log(folder: Path) -> None:
    run = run_of(folder)
    (run / "steps.jsonl").write_text('{"step": 0, "reward": 0.5}\n{"st\n{}\n')
    (run / "updates.jsonl").touch()


@functools.cache
def interrupted_run() -> Path:
    """A run with checkpoints and no summary, made once."""
    folder = Path(tempfile.mkdtemp(prefix="moe-rl-run-"))
    done = moe_rl(*RUN, "--checkpoint-every", "1", cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "run" / "summary.json").unlink()
    return folder / "run"


def interrupted(folder: Path, *, damaged: bool = False) -> None:
    shutil.copytree(interrupted_run(), folder / "run")
    for file in (folder / "run" / "checkpoints").rglob("*.safetensors") if damaged else ():
        file.write_bytes(file.read_bytes()[:-4])


LONGER = ("train", "--preset", "tiny", "--out", "run")
CHECKPOINTED = (*RUN, "--checkpoint-every", "1")
FOLDERS = {
    "a file instead of a folder": Fault((*TINY, "--out", "a_file"), write("a_file", "")),
    "a folder without permission": Fault(
        (*TINY, "--out", "shut/run"),
        lambda folder: (folder / "shut").mkdir(mode=0o555),
        child=bound_by_permissions,
    ),
    "other files in the folder": Fault((*TINY, "--out", "thesis"), thesis),
    "a run of other settings": Fault((*RUN, "--seed", "5"), run_of),
    "a run that is being written": Fault(RUN, in_use),
    "a full disk": Fault(RUN, writes=True, child=small_files),
    "a checkpoint, and no --resume": Fault(CHECKPOINTED, interrupted),
    "no intact checkpoint": Fault(
        (*CHECKPOINTED, "--resume"), functools.partial(interrupted, damaged=True), writes=True
    ),
    "no crash bundle": Fault(("debug-crash", "nowhere")),
    "no folder to report": Fault(("report", "nowhere")),
    "no run to report": Fault(("report", "thesis"), thesis),
    "a malformed line of a log": Fault(("report", "run"), torn_log),
    "a folder of another study": Fault(
        ("reproduce", "--out", "thesis"),
        lambda folder: thesis(folder, **{"study.json": '{"schema": 1, "name": "mine"}'}),
    ),
    "no study to pool": Fault(("pool", "thesis", "--out", "pooled"), thesis),
    "a seed that is not in the plan": Fault(("study", "tolerance", "--seeds", "99")),
    "a cold start that diverges": Fault((*LONGER, "--sft-learning-rate", "1e30"), writes=True),
    "a run that diverges: NaN or inf": Fault(
        (*LONGER, "--warmup-steps", "0", "--learning-rate", "1e30"), writes=True
    ),
}

WEIGHTS = "model.safetensors"


@functools.cache
def saved_model() -> Path:
    """A whole model folder, made once."""
    folder = Path(tempfile.mkdtemp(prefix="moe-rl-model-"))
    policy = small_policy()
    policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    return folder


def model(change: Callable[[Path], object]) -> Fault:
    """Training from a copy of the whole model in which something was changed."""

    def given(folder: Path) -> None:
        shutil.copytree(saved_model(), folder / "model")
        change(folder / "model")

    return Fault((*RUN, "--checkpoint", "model"), given)


def configured(**changes: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def without_a_shard(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    names = sorted(weights)
    first = {name: weights[name] for name in names[: len(names) // 2]}
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    save_file(first, folder / shards[0], {"format": "pt"})
    (folder / WEIGHTS).unlink()
    places = {name: shards[name not in first] for name in names}
    index = {"metadata": {}, "weight_map": places}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def without_experts(folder: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 13}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(folder)


def offline(folder: Path) -> pytest.MonkeyPatch:
    """As without a network, and without waiting for one."""
    import datasets
    import huggingface_hub

    patch = pytest.MonkeyPatch()
    patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return patch


MODELS = {
    "no model in the folder": model(lambda x: (x / "config.json").unlink()),
    "no weights": model(lambda x: (x / WEIGHTS).unlink()),
    "pickled weights": model(lambda x: (x / WEIGHTS).rename(x / "pytorch_model.bin")),
    "weights that are cut off": model(
        lambda x: (x / WEIGHTS).write_bytes((x / WEIGHTS).read_bytes()[:-100])
    ),
    "a missing shard": model(without_a_shard),
    "no tokenizer": model(without_tokenizer),
    "weights of other shapes": model(configured(moe_intermediate_size=24)),
    "a family unknown to transformers": model(configured(model_type="evil")),
    "a model without experts": model(without_experts),
    "a tokenizer without the characters": model(
        lambda x: tokenizer_of("abcdefghijk").save_pretrained(x)
    ),
    "a hub id that cannot be had": Fault((*RUN, "--checkpoint", "acme/none"), offline),
}

DATASET = (*RUN, "--task", "dataset")
READ = (*DATASET, "--dataset", "rows.jsonl")
ROW = b'{"prompt": "1+1=", "answer": "2"}\n'


NUMBER = ("--judge", "last_number")


def without_math_verify(folder: Path) -> object:
    write("rows.jsonl", ROW)(folder)
    return not_installed("math_verify")(folder)


def bad_reward(folder: Path) -> None:
    write("rows.jsonl", ROW)(folder)
    write("own.py", "import math\nmine = maths.floor\n")(folder)


def third_line(line: bytes) -> Fault:
    """Two good rows, this one and a good one."""
    return Fault(READ, write("rows.jsonl", ROW * 2 + line + b"\n" + ROW))


def changed_dataset(folder: Path) -> None:
    """old.json, of a run on a file that has another content since."""
    write("rows.jsonl", ROW)(folder)
    config = preset("tiny").replace(task="dataset", dataset="rows.jsonl", dataset_sha256="0" * 64)
    (folder / "old.json").write_text(json.dumps(config.to_dict()))


IDS = np.tile(np.arange(2, dtype=np.int16), (1, 4, 2, 1))


def batch(name: str, **arrays: np.ndarray) -> Fault:
    """Inspection of a file of arrays."""
    return Fault(("inspect", name), lambda folder: np.savez(folder / name, **arrays))


AUDIT = ("audit", "nowhere", "--prompts", "running_sum")


def model_and_trace(folder: Path) -> None:
    shutil.copytree(saved_model(), folder / "model")
    np.save(folder / "t.npy", IDS)


def trace(name: str, content: str | Callable[[Path], object]) -> Fault:
    """Churn of a file with itself."""

    def given(folder: Path) -> None:
        if isinstance(content, str):
            (folder / name).write_text(content)
        else:
            content(folder / name)

    return Fault(("churn", name, name), given)


def ids(array: np.ndarray) -> Fault:
    return trace("t.npy", lambda path: np.save(path, array))


def cut_off(path: Path) -> None:
    save_file({"routed_experts": IDS}, path)
    path.write_bytes(path.read_bytes()[:-4])


def two_shapes(folder: Path) -> None:
    np.save(folder / "a.npy", IDS)
    np.save(folder / "b.npy", IDS[:, :, :1])


DATA = {
    "no dataset is named": Fault(DATASET),
    "a dataset that is not there": Fault(READ),
    "an empty dataset": Fault(READ, write("rows.jsonl", "")),
    "a line that is not JSON": third_line(b'{"prompt": "1+1=", "answer": "2"'),
    "a row without an answer": third_line(b'{"prompt": "1+1="}'),
    "no such column": Fault((*READ, "--prompt-column", "question"), write("rows.jsonl", ROW)),
    "an answer that is not a text": third_line(b'{"prompt": "1+1=", "answer": [2]}'),
    "an answer that its judge refuses": Fault(
        (*READ, *NUMBER, "--response-tokens", "9"),
        write("rows.jsonl", ROW.replace(b'"2"', b'"two"')),
    ),
    "no tests of a program": Fault(
        (*READ, "--judge", "code", "--response-tokens", "9"), write("rows.jsonl", ROW)
    ),
    "a judge not installed": Fault(
        (*READ, "--judge", "math_verify", "--response-tokens", "9"), without_math_verify
    ),
    "a judge without a response length": Fault((*READ, *NUMBER), write("rows.jsonl", ROW)),
    "an own reward that cannot be loaded": Fault(
        (*READ, "--reward", "own.py:mine", "--response-tokens", "9"), bad_reward
    ),
    "a hub dataset that cannot be had": Fault((*DATASET, "--dataset", "acme/none"), offline),
    "a dataset that has changed": Fault(
        ("train", "--config", "old.json", "--out", "run"), changed_dataset
    ),
    "a prompt longer than the context": Fault(
        READ, write("rows.jsonl", ROW + ROW.replace(b"1+1=", b"1" * 1024))
    ),
    "an answer longer than a response": Fault(
        (*READ, "--response-tokens", "1"), write("rows.jsonl", ROW)
    ),
    "a trace that is not there": Fault(("churn", "t.npy", "t.npy")),
    "an unknown kind of trace": trace("t.csv", "0,1\n"),
    "a trace that is cut off": trace("t.safetensors", cut_off),
    "no array of that name": trace("t.npz", lambda path: np.savez(path, routes=IDS)),
    "an engine response without routes": trace("t.json", '{"choices": [{"text": "hello"}]}'),
    "an SGLang response without sizes": trace(
        "t.json", '{"meta_info": {"routed_experts": "AAAA"}}'
    ),
    "a response that lacks rows": trace(
        "t.json", '{"prompt_token_ids": [5, 5], "token_ids": [6], "routed_experts": [[[0, 1]]]}'
    ),
    "an expert id below -1": ids(np.where(IDS == 0, -7, IDS)),
    "an expert chosen twice": ids(np.full_like(IDS, 3)),
    "a trace without records": ids(np.zeros_like(IDS)),
    "traces of two models": Fault(("churn", "a.npy", "b.npy"), two_shapes),
    "an audit of no prompts": Fault((*AUDIT, "--num-prompts", "0")),
    "an audit's prompts in another column": Fault(
        ("audit", "nowhere", "--prompts", "rows.jsonl", "--prompt-column", "ask"),
        write("rows.jsonl", ROW),
    ),
    "an audit of a folder without a model": Fault(AUDIT),
    "an audit's trace without tokens": Fault(
        ("audit", "model", "--prompts", "running_sum", "--trace", "t.npy"), model_and_trace
    ),
    "an audit's prompt beyond the context": Fault(
        ("audit", "model", "--prompts", "running_sum", "--max-tokens", "5000"), model_and_trace
    ),
    "a batch that is not there": Fault(("inspect", "b.safetensors")),
    "an unknown kind of batch": Fault(("inspect", "b.csv"), write("b.csv", "1,2")),
    "a batch without a mask": batch("b.npz", old_logprobs=np.zeros((1, 4))),
    "a batch of unequal shapes": batch(
        "b.npz", old_logprobs=np.zeros((1, 3)), response_mask=np.ones((1, 4), bool)
    ),
}

FAULTS = OPTIONS | FOLDERS | MODELS | ARMS | DATA
TABLE_ROW = re.compile(r"^\| (?P<what>.*?) +\| `(?P<message>[^`]+)` +\| (?P<code>\d+) +\|$", re.M)
ROWS = {row["what"]: row for row in TABLE_ROW.finditer(PAGE.read_text())}


def test_every_row_is_tried_and_every_trial_is_a_row() -> None:
    assert list(ROWS) == list(FAULTS)


def contents(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_size for path in folder.rglob("*")}


def said(stderr: str) -> str:
    """The message without its prefix, and without the frame of the option parser's boxes."""
    if stderr.startswith("\u256d"):
        lines = stderr.splitlines()[1:]  # the first is the frame with its title
        return " ".join(re.sub("[\u2500-\u257f]", " ", " ".join(lines)).split())
    assert stderr.startswith("moe-rl: "), stderr
    return stderr.splitlines()[-1].removeprefix("moe-rl: ")


@pytest.mark.parametrize("what", FAULTS)
def test_what_the_table_says_is_what_a_user_gets(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    fault, row = FAULTS[what], ROWS[what]
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    kept = fault.given(tmp_path)
    before = contents(tmp_path)
    capfd.readouterr()
    if fault.child is None:  # in this process, as importing torch takes seconds
        code = main(fault.command)
        stdout, stderr = capfd.readouterr()
    else:
        done = moe_rl(*fault.command, cwd=tmp_path, child=fault.child)
        code, stdout, stderr = done.returncode, done.stdout, done.stderr
    if isinstance(kept, pytest.MonkeyPatch):
        kept.undo()
    del kept
    assert code == int(row["code"]), stderr
    pattern = ".*".join(re.escape(part) for part in row["message"].split("..."))
    assert re.match(pattern, said(stderr)), stderr
    if not fault.writes:
        assert stdout == "" and contents(tmp_path) == before


def test_errors_of_the_system_say_what_to_do() -> None:
    assert explain(OSError(28, "No space left", "run/x")) == (
        2,
        "run/x: the disk is full; what was written stays",
    )
    assert explain(RuntimeError("[enforce fail] alloc_cpu.cpp: can't allocate memory"))[0] == 2  # type: ignore[index]
    assert explain(FloatingPointError("the run has diverged")) == (1, "the run has diverged")
    assert explain(RuntimeError("a bug of ours")) is None


def test_a_wrong_option_is_reported_without_importing_torch() -> None:
    code = "import sys; from moe_rl.commands.cli import main; assert main(sys.argv[1:]) in (0, 2)"
    code += "; sys.exit('torch' in sys.modules)"
    for words in (["--help"], ["train", "--help"], ["train", "--group-size", "1"], ["trian"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, check=False
        )
        assert done.returncode == 0, words
