"""The race of log-probabilities: what it measures, and what it says when it cannot."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_rl.commands.cli import main
from moe_rl.experiments.bench import logprob_peers
from moe_rl.experiments.bench.logprobs import exact_logprobs
from moe_rl.kernels import token_logprobs


def test_a_race_writes_its_numbers_and_a_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results" / "bench.json"
    options = ["--repeats", "2", "--shapes", "70,16,300", "--dtypes", "float32", "bfloat16"]
    options += ["--threads", str(torch.get_num_threads()), "--out", str(out)]
    code = main(["bench", "logprobs", *options])
    shown = capsys.readouterr().out
    assert code == 0 and out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    result = json.loads(out.read_text())
    assert [case["dtype"] for case in result["cases"]] == ["float32", "bfloat16"]
    for case in result["cases"]:
        rows = case["contestants"]
        assert {"moe-rl", *logprob_peers.MATERIALISED} <= rows.keys()
        assert rows["moe-rl"]["max_error_nats"] < 1e-5
        # A far slower one may run in one round only, and on a busy machine any may look it.
        assert len(rows["moe-rl"]["both"]) == 2 and all(row["both"] for row in rows.values())
    # Every peer either ran or is listed with why.
    raced = set(result["cases"][0]["contestants"])
    assert raced | set(result["absent"]) == {*logprob_peers._MAKERS, "quack"}
    for name, reason in result["absent"].items():
        assert f"{name}: not here: {reason}" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shapes", "8,16"], "shapes='8,16': give N,H,V as in 1024,1024,32768"),
        (["--shapes", "8,16,-3"], "shapes='8,16,-3'"),
        (["--repeats", "0"], "repeats=0: must be at least 1"),
        (["--threads", "0"], "threads=0: must be at least 1"),
        (["--out", "x.csv"], "out='x.csv': give a name that ends in .json"),
    ],
)
def test_a_bad_option_is_one_line_and_exit_code_2(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "logprobs", *options]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("moe-rl: ") and message in lines[0]


def test_options_of_one_benchmark_are_not_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "training", "--dtypes", "float32"]) == 2
    assert "dtypes belongs to moe-rl bench logprobs" in capsys.readouterr().err


def test_a_peer_that_is_not_installed_is_listed_with_the_way_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(logprob_peers.importlib, "import_module", missing)
    running, absent = logprob_peers.contestants(torch.device("cpu"))
    assert "moe-rl" in running and "TRL chunked" not in running
    assert absent["TRL chunked"] == "not installed (trl.kernels): pip install 'moe-rl[bench]'"


def test_a_peer_without_a_number_a_token_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    mean = {"mean": lambda: lambda h, w, t: torch.nn.functional.cross_entropy(h @ w.T, t)}
    monkeypatch.setattr(logprob_peers, "_MAKERS", mean)
    running, absent = logprob_peers.contestants(torch.device("cpu"))
    assert not running and "not one number a token" in absent["mean"]


# In a process of its own: other tests keep freed memory for reuse, which hides or doubles a peak.
_PEAK = """
import torch
from moe_rl.experiments.bench.logprob_memory import peak_bytes

def run():
    torch.ones(2**25).sum()  # 128 MiB, gone before the output comes
    return torch.ones(2**24)

print(peak_bytes(run, (), torch.device("cpu")))
"""


def test_the_peak_leaves_the_output_out() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PEAK], capture_output=True, text=True, check=True, timeout=120
    )
    if done.stdout.strip() == "None":
        pytest.skip("this system does not tell a process its peak memory")
    # 128 MiB at the peak, less the 64 that are returned.
    assert 50 * 2**20 < int(done.stdout) < 90 * 2**20


def test_the_yardstick_is_the_definition_in_float64() -> None:
    draw = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(5, 8, generator=draw), torch.randn(9000, 8, generator=draw)
    targets = torch.tensor([0, 8191, 8192, 8999, 7])
    expected = token_logprobs(
        hidden.double(), weight.double(), targets, backend="reference"
    ).logprobs
    torch.testing.assert_close(exact_logprobs(hidden, weight, targets), expected)
