"""`moe-rl bench`: speed against peers."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from moe_rl.commands.options import Command
from moe_rl.config import ConfigError
from moe_rl.runtime.cores import cores


@dataclass(frozen=True, kw_only=True)
class Bench(Command):
    """Measure speed against peers, all in one interleaved run."""

    what: tyro.conf.Positional[Literal["training", "logprobs", "routing", "ranks"]] = "training"
    """training: rollout steps per second against TRL's GRPOTrainer, and the cost of instruments;
    logprobs: time, memory and error of token log-probabilities; routing: the cost of recording and
    replay; ranks: the speed-up by a second process."""
    repeats: int = 5
    """Interleaved measurements of each contestant (>= 1)."""
    out: Path | None = None
    """JSON file for the results; logprobs also draws a figure beside it."""
    shapes: tuple[str, ...] = ()
    """For logprobs: N,H,V of each problem. Default: CPU or GPU shapes of docs/kernels.md."""
    dtypes: tuple[Literal["float32", "bfloat16", "float16"], ...] = ()
    """For logprobs: dtypes of the inputs. Default: float32 and bfloat16; on a GPU bfloat16."""
    threads: int | None = None
    """For logprobs: torch threads on a CPU (>= 1). Default: the number of cores."""

    def run(self) -> int:
        """Run the benchmark, print its table and write its JSON file."""
        if self.what == "logprobs":
            from moe_rl.experiments.bench.logprobs import bench_logprobs

            code = bench_logprobs(
                repeats=self.repeats,
                shapes=self.shapes,
                dtypes=self.dtypes,
                threads=cores() if self.threads is None else self.threads,
                out=self.out,
            )
            if self.out is not None:
                from moe_rl.analysis.plots.logprobs import logprob_bars

                figure = self.out.with_suffix(".png")
                logprob_bars(json.loads(self.out.read_text("utf-8"))).savefig(figure, dpi=130)
                print(f"written: {figure}")
            return code
        for name in ("shapes", "dtypes", "threads"):
            if getattr(self, name):
                raise ConfigError(f"{name} belongs to moe-rl bench logprobs, not to {self.what}")
        if self.what == "routing":
            from moe_rl.experiments.bench.routing import bench_routing as bench
        elif self.what == "ranks":
            from moe_rl.experiments.bench.ranks import bench_ranks as bench
        else:
            from moe_rl.experiments.bench.training import bench_training as bench
        return bench(repeats=self.repeats, out=self.out)
