"""Log-probabilities against every installed peer: time, memory and error, in one interleaved run.

    moe-rl bench logprobs --out results/bench-logprobs.json

In each round every contestant takes one forward pass without gradients and one forward and backward
pass, on the same tensors; what the machine does to one it does to all. Times are medians over the
rounds. Memory is the peak beyond inputs, outputs and gradients. The error is that of a sample of
tokens against float64, in nats.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_rl.config import ConfigError
from moe_rl.experiments.bench.logprob_memory import peak_bytes
from moe_rl.experiments.bench.logprob_peers import OURS, Contestant, contestants
from moe_rl.experiments.bench.result import check_counts, table, write_result
from moe_rl.kernels import choose_backend
from moe_rl.kernels.product import product
from moe_rl.policy.build import resolve_device
from moe_rl.runtime.process import cpu_name

SMALL = "1088,96,13"  # a minibatch of the small study: 64 responses of 17 tokens
CPU_SHAPES = (SMALL, "1024,1024,32768", "512,2048,151936")
GPU_SHAPES = ("8192,2048,151936", "16384,4096,131072")
_SAMPLE = 256  # tokens whose error is measured
_LOGIT_STD = 3.0  # a trained model's rows are neither flat nor all peaked
_SLOW = 6.0  # a contestant this many times slower than ours runs in one round only


@dataclass(frozen=True, kw_only=True)
class Shape:
    """N tokens, H hidden size, V words."""

    n: int
    h: int
    v: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """From `N,H,V`.

        Raises:
            ConfigError: not three positive whole numbers.
        """
        parts = text.split(",")
        if len(parts) != 3 or not all(part.strip().isdigit() and int(part) for part in parts):
            raise ConfigError(f"shapes={text!r}: give N,H,V as in 1024,1024,32768")
        return cls(n=int(parts[0]), h=int(parts[1]), v=int(parts[2]))


def bench_logprobs(
    *,
    repeats: int,
    shapes: tuple[str, ...],
    dtypes: tuple[str, ...],
    threads: int,
    out: Path | None,
) -> int:
    """Run the race, print the tables, write JSON; returns the exit code.

    Raises:
        ConfigError: a bad option.
    """
    check_counts(repeats=repeats, threads=threads)
    device = resolve_device("auto")
    on_gpu = device.type == "cuda"
    usual = GPU_SHAPES if on_gpu else CPU_SHAPES
    names = dtypes or (("bfloat16",) if on_gpu else ("float32", "bfloat16"))
    cases = [(Shape.parse(text), name) for text in shapes or usual for name in names]
    if out is not None and out.suffix != ".json":
        raise ConfigError(f"out={str(out)!r}: give a name that ends in .json")
    torch.set_num_threads(threads)
    running, absent = contestants(device)
    result: dict[str, Any] = {**_machine(device), "absent": absent, "cases": []}
    for shape, dtype in cases:
        case = race(running, shape, getattr(torch, dtype), device, repeats)
        result["cases"].append(case)
        print(_table(case), end="\n\n", flush=True)
    for name, reason in absent.items():
        print(f"{name}: not here: {reason}")
    write_result(result, out)
    return 0


def race(
    running: dict[str, Contestant],
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
) -> dict[str, Any]:
    """All contestants on one shape and dtype; the measurements as plain numbers."""
    hidden, weight, targets, upstream = _inputs(shape, dtype, device)
    truth = exact_logprobs(hidden[:_SAMPLE], weight, targets[:_SAMPLE])
    rows: dict[str, dict[str, Any]] = {}
    for number in range(repeats):
        for name, contestant in running.items():
            row = rows.setdefault(name, {"forward": [], "both": []})
            if number and min(row["both"]) > _SLOW * min(rows[OURS]["both"]):
                continue

            def forward(contestant: Contestant = contestant) -> Tensor:
                with torch.no_grad():
                    return contestant(hidden, weight, targets)

            def both(contestant: Contestant = contestant) -> Tensor:
                logprobs = contestant(hidden, weight, targets)
                (logprobs * upstream).sum().backward()
                return logprobs.detach()

            if not number:
                _first_round(row, forward, both, truth, (hidden, weight), device)
            row["forward"].append(_seconds(forward, device))
            hidden.grad = weight.grad = None
            row["both"].append(_seconds(both, device))
            hidden.grad = weight.grad = None
    return _case(rows, shape, dtype, device)


def exact_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Float64 log-probabilities by materialised logits, the weight upcast a piece at a time."""
    rows = hidden.detach().double()
    scores = torch.cat([rows @ part.detach().double().T for part in weight.split(8192)], dim=1)
    return scores.log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)


def _inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden, weight, targets and an upstream gradient that differs from token to token."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(shape.n, shape.h, generator=draw)
    weight = torch.randn(shape.v, shape.h, generator=draw).mul_(_LOGIT_STD / shape.h**0.5)
    targets = torch.randint(shape.v, (shape.n,), generator=draw)
    upstream = torch.randn(shape.n, generator=draw)
    return (
        hidden.to(device, dtype).requires_grad_(),
        weight.to(device, dtype).requires_grad_(),
        targets.to(device),
        upstream.to(device),
    )


def _first_round(
    row: dict[str, Any],
    forward: Callable[[], Tensor],
    both: Callable[[], Tensor],
    truth: Tensor,
    leaves: tuple[Tensor, Tensor],
    device: torch.device,
) -> None:
    """Error and memory, which need no repetition; also the warm-up."""
    off = forward()[: len(truth)].double() - truth
    row["max_error_nats"] = off.abs().max().item()
    row["rms_error_nats"] = off.square().mean().sqrt().item()
    row["forward_peak_bytes"] = peak_bytes(forward, (), device)
    for leaf in leaves:
        leaf.grad = None
    row["both_peak_bytes"] = peak_bytes(both, leaves, device)
    for leaf in leaves:
        leaf.grad = None


def _seconds(run: Callable[[], Tensor], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _case(
    rows: dict[str, dict[str, Any]], shape: Shape, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    operations = 2.0 * shape.n * shape.h * shape.v
    rate = _product_rate(shape, dtype, device)
    for row in rows.values():
        row["median_forward"] = statistics.median(row["forward"])
        row["median_both"] = statistics.median(row["both"])
    ours = rows[OURS]
    backend = choose_backend(device=device, dtype=dtype, num_tokens=shape.n, vocab=shape.v)
    return {
        "shape": [shape.n, shape.h, shape.v],
        "dtype": str(dtype).removeprefix("torch."),
        "backend": list(backend),
        "contestants": rows,
        "product_rate": rate,
        # Forward 2NHV; forward and backward with the scores computed anew 8NHV.
        "share_of_product_rate": {
            "forward": operations / ours["median_forward"] / rate,
            "both": 4 * operations / ours["median_both"] / rate,
        },
    }


def _product_rate(shape: Shape, dtype: torch.dtype, device: torch.device) -> float:
    """The best rate of a matrix product in the arithmetic of our path, operations a second."""
    ours = torch.float32 if device.type == "cpu" else dtype
    words = min(shape.v, 2048 if device.type == "cpu" else 16384)
    a = torch.randn(shape.n, shape.h, device=device).to(ours)
    b = torch.randn(shape.h, words, device=device).to(ours)
    times = [_seconds(lambda: product(a, b), device) for _ in range(12)]
    return 2.0 * shape.n * shape.h * words / min(times)


def _machine(device: torch.device) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _table(case: dict[str, Any]) -> str:
    """The measurements of one shape and dtype as text."""
    n, h, v = case["shape"]
    head = [
        "",
        "forward, s",
        "+ backward",
        "peak MiB",
        "+ backward",
        "rms error, nats",
        "max error",
    ]
    rows = [head]
    for name, row in case["contestants"].items():
        peaks = (row["forward_peak_bytes"], row["both_peak_bytes"])
        rows.append(
            [
                name,
                f"{row['median_forward']:.3g}",
                f"{row['median_both']:.3g}",
                *("?" if peak is None else f"{peak / 2**20:.0f}" for peak in peaks),
                f"{row['rms_error_nats']:.1e}",
                f"{row['max_error_nats']:.1e}",
            ]
        )
    title = f"N={n} H={h} V={v} {case['dtype']}; moe-rl: {case['backend'][0]}"
    lines = [title, table(rows)]
    share = case["share_of_product_rate"]
    if case["backend"][0] != "reference":  # which does other operations, on few logits
        lines.append(
            f"moe-rl reaches {share['forward']:.0%} forward and {share['both']:.0%} with backward "
            f"of the {case['product_rate'] / 1e9:.0f} GFLOP/s that one product in its arithmetic "
            "reaches"
        )
    return "\n".join(lines)
