"""Faults of options and configs: found before torch is imported."""

import json
from pathlib import Path

from faults.table import Fault


def config(text: str | bytes):
    """bad.json with this text."""

    def given(folder: Path) -> None:
        (folder / "bad.json").write_bytes(text if isinstance(text, bytes) else text.encode())

    return given


def bad(text: str | bytes) -> Fault:
    return Fault(("train", "--config", "bad.json"), config(text))


def a_file(folder: Path) -> None:
    (folder / "a_file").touch()


def circle(folder: Path) -> None:
    (folder / "loop").symlink_to("loop")


def not_installed(package: str):
    """A file that Python finds first, and that says what it says where the package is not."""

    def given(folder: Path) -> None:
        text = f'raise ModuleNotFoundError("No module named {package!r}")\n'
        (folder / f"{package}.py").write_text(text)

    return given


OPTIONS = {
    "no such command": Fault(("trian",)),
    "no such option": Fault(("train", "--algoritm", "gspo")),
    "no such preset": Fault(("train", "--preset", "tinny")),
    "a value of another type": Fault(("train", "--steps", "many")),
    "a value out of range": Fault(("train", "--group-size", "1")),
    "values that exclude each other": Fault(
        ("train", "--routing-replay", "R2", "--old-logprobs", "rollout")
    ),
    "noise in an engine of others": Fault(
        ("train", "--engine", "vllm", "--router-noise", "0.1"),
    ),
    "an engine that is not installed": Fault(
        ("train", "--preset", "tiny", "--engine", "vllm"), not_installed("vllm")
    ),
    "a tracker that is not installed": Fault(
        ("train", "--preset", "tiny", "--tracker", "wandb"), not_installed("wandb")
    ),
    "layers without end": Fault(("train", "--num-layers", "1000000000")),
    "more experts than ids": Fault(("train", "--num-experts", "100000")),
    "a label that leads to another folder": Fault(("train", "--setting", "../evil")),
}

CONFIGS = {
    "not there": Fault(("train", "--config", "nowhere.json")),
    "a folder": Fault(("train", "--config", ".")),
    "a path through a file": Fault(("train", "--config", "a_file/x.json"), a_file),
    "links in a circle": Fault(("train", "--config", "loop"), circle),
    "a name of 300 letters": Fault(("train", "--config", "x" * 300)),
    "a name of two lines": Fault(("train", "--config", "two\nlines.json")),
    "a name of control characters": Fault(("train", "--config", "\x1b[31m\u202e.json")),
    "no file but a device": Fault(("train", "--config", "/dev/zero")),
    "nothing in it": bad(""),
    "not JSON": bad('{\n "steps": 3,,\n}'),
    "not text": bad(b"\xff\xfe\x00"),
    "JSON, but no object": bad("[1, 2]"),
    "brackets without end": bad("[" * 100_000),
    "a number of 5000 digits": bad('{"steps": ' + "9" * 5000 + "}"),
    "a number beyond floats": bad('{"clip_low": ' + "9" * 400 + "}"),
    "a key twice": bad('{"model": {"num_experts": 4, "num_experts": 8}}'),
    "an unknown key": bad('{"learning_rat": 1e-3}'),
    "an unknown key of a part": bad('{"model": {"num_expert": 4}}'),
    "a key of two lines": bad('{"learning\\nrate": 1e-3}'),
    "a part that is no object": bad('{"task": "countdown"}'),
    "a value of another type": bad('{"steps": "3"}'),
    "a value out of range": bad('{"temperature": NaN}'),
    "of another version": bad(json.dumps({"schema": 99, "config": {}})),
}
