"""`moe-rl churn TRACE_A TRACE_B`: how two routings of the same tokens differ."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from moe_rl.commands.options import Command, TraceLayout
from moe_rl.config import ConfigError

_FIGURES = ".png", ".svg", ".pdf"


@dataclass(frozen=True, kw_only=True)
class Churn(TraceLayout, Command):
    """Compare two recorded routings of the same tokens: churn by layer and position."""

    trace_a: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TRACE_A")]
    """File or folder: npz, npy, safetensors, json, jsonl, parquet; jsonl or folder: Megatron-LM."""
    trace_b: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TRACE_B")]
    """The same tokens, routed by another policy or another engine."""
    plot: Path | None = None
    """Figure file to draw (.png, .svg or .pdf)."""

    def run(self) -> int:
        """Print the tables; draw the figure."""
        if self.plot is not None and self.plot.suffix not in _FIGURES:
            kinds = ", ".join(_FIGURES)
            raise ConfigError(f"plot={str(self.plot)!r}: use a name ending in {kinds}")
        from moe_rl.replay_check.compare import compare, describe, usable
        from moe_rl.traces.files import same_tokens

        paths = self.trace_a, self.trace_b
        read = [self.read(path) for path in paths]
        traces = [usable(one.routed_experts, path) for one, path in zip(read, paths, strict=True)]
        result = compare(*same_tokens(*(routes for routes, _ in traces)))
        for path, one, (_, note) in zip(paths, read, traces, strict=True):
            for line in (*(f"{path}: {said}" for said in one.notes), note):
                if line:
                    print(line)
        print(describe(result))
        if self.plot is not None:
            from moe_rl.analysis.plots.traces import churn_of_traces

            figure = churn_of_traces(result.by_layer, result.bins, result.by_position)
            self.plot.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(self.plot)
            print(f"plot: {self.plot}")
        return 0
